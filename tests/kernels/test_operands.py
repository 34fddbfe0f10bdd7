"""Operands as the kernels take them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.operands import _dot_dtype

SINGLE, HALF, BRAIN = (torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))


@pytest.mark.parametrize(("operands", "dtype"), [((SINGLE, BRAIN, SINGLE), torch.bfloat16), ((HALF, SINGLE), torch.float16)])
def test_the_narrowest_dtype_is_found_also_while_torch_traces(operands: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    assert _dot_dtype(*operands) == dtype

    def converted(*operands: Tensor) -> Tensor:
        return operands[0].to(_dot_dtype(*operands))

    assert torch.compile(converted, backend="eager", fullgraph=True)(*operands).dtype == dtype
