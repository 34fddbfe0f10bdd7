"""Short rows without states, tile by tile, in fp32 against the token loop in fp64; and what takes these kernels."""

from unittest import mock

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.walks import short_rows, walk
from tests.kernels.cases_recurrence import check, check_vmap, draw
from tests.kernels.oracle import poisoned

TILE = short_rows.Config(16, 16, 4, 1, step=32)


@pytest.fixture(autouse=True)
def _short_tiles_and_poison():
    """Sizes that the interpreter can do, in the only dtype that it knows."""
    sizes = {"DTYPES": (torch.float32,), "FORWARD": {256: TILE}, "BACKWARD": {256: TILE}, "LONGEST": {256: 512}}
    with use_backend("triton"), poisoned(), mock.patch.multiple(short_rows, **sizes):
        yield


# batch, length, groups, heads, key width, value width: tiles of 16 tokens, of which the last is short; one tile; one token
@pytest.mark.parametrize("shape", [(2, 40, 1, 2, 20, 33), (1, 11, 2, 2, 16, 16), (1, 1, 1, 1, 16, 16)], ids=str)
@pytest.mark.parametrize("gate", ["none", "constant", "scalar", "strong", "zero", "rare"])
def test_equals_the_token_loop(shape, gate):
    with mock.patch.object(walk, "_walk_back", side_effect=AssertionError("the walks")):
        check(shape, gate, state=False)


@pytest.mark.parametrize("gate", ["none", "constant", "scalar"])
def test_vmap_equals_loop(gate):
    check_vmap([draw((2, 20, 1, 2, 16, 16), gate, state=False, seed=seed, dtype=torch.float32) for seed in range(2)])


def test_torch_accepts_the_operator():
    tensors = draw((2, 20, 1, 2, 16, 16), "scalar", state=False, dtype=torch.float32)
    torch.library.opcheck(torch.ops.mixer_bench.linear_recurrence.default, (*tensors.values(), None, None, False))
