"""Memory of what is kept: parts lie apart, where their rows allow, and a batch that is cut and joined again keeps them."""

from __future__ import annotations

import torch

from kernels._kept import memory_for, parts_of

PARTS = [
    ((6, 3), torch.int32),
    ((0,), torch.bfloat16),
    ((6, 5, 2, 3), torch.bfloat16),
    ((6, 64, 64), torch.bfloat16),
    ((6, 2, 8), torch.float32),
]


def test_parts_lie_apart():
    memory = memory_for(PARTS, torch.empty(6, 1))
    parts = parts_of(memory, PARTS)
    assert [(tuple(x.shape), x.dtype) for x in parts] == PARTS
    for number, x in enumerate(parts):
        x.fill_(number + 1)
    assert [x.unique().tolist() for x in parts] == [[1], [], [3], [4], [5]]
    assert sum(x.nbytes for x in parts) == memory.nbytes  # no gaps, whose bytes would differ from call to call
    wide = [x for x in parts if x.numel() and x[0].nbytes % 16 == 0]
    assert len(wide) == 2
    assert all((x.data_ptr() - memory.data_ptr()) % 16 == 0 for x in wide)


def test_a_batch_may_be_cut_into_members():
    memory = memory_for(PARTS, torch.empty(6, 1)).random_(256)
    joined = torch.stack(list(memory.unflatten(0, (3, 2)))).flatten(0, 1)
    for a, b in zip(parts_of(memory, PARTS), parts_of(joined, PARTS), strict=True):
        torch.testing.assert_close(a.view(torch.uint8), b.view(torch.uint8))
