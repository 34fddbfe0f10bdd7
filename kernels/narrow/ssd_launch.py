"""Launches what lies between Mamba-2's projection and its gate, where states are narrow: convolution and recurrence.

Shape legend: as `kernels.narrow.ssd_forward_triton`; K taps, R numbers of a projected row: W for the convolution, H raw time
steps, and spare ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels._members import even_rows
from kernels.convolutions import conv_backward_triton, conv_triton


class Config(NamedTuple):
    """How a kernel is compiled: warps of a program, stages of its loop, and registers of a thread if fewer than it would take."""

    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """For a launch."""
        return {"STAGES": self.stages, "num_warps": self.warps, "maxnreg": self.registers}


CHUNK, FP32_CHUNK = 32, 16
"""Tokens of a chunk, which all kernels share."""
COLUMNS = 32
"""Columns of a head that the backward pass in Triton has in registers at once."""
FORWARD = {16: Config(1, 2), 32: Config(2, 3)}
"""In Triton, by padded N."""
BEHIND, BACKWARD = Config(1, 2), Config(2, 1)
MOST_HEADS = 32
"""Of a group, in Gluon."""


class Weights(NamedTuple):
    """Of M members: taps [M, W, K] and bias [M, W] or None of the convolution; the rest of each head, [M, H].

    These are the bias of its time steps, the log of its decay's rate and its skip.
    """

    taps: Tensor
    bias: Tensor | None
    step_bias: Tensor
    log_rate: Tensor
    skip: Tensor


class Sizes(NamedTuple):
    """P and N."""

    head_dim: int
    d_state: int


def chunk_of(row: Tensor) -> int:
    """Tokens of a chunk."""
    return FP32_CHUNK if row.dtype == torch.float32 else CHUNK


def kept_shape(row_BTR: Tensor, weights: Weights, sizes: Sizes) -> tuple[int, ...]:
    """Of the states behind all chunks but the last."""
    batch, length, _ = row_BTR.shape
    return batch, weights.skip.shape[1], -(-length // chunk_of(row_BTR)) - 1, sizes.d_state, sizes.head_dim


def _constants(row: Tensor, weights: Weights, sizes: Sizes) -> dict[str, Any]:
    heads, width = weights.skip.shape[1], weights.taps.shape[1]
    groups = (width - heads * sizes.head_dim) // (2 * sizes.d_state)
    return {
        "H": heads, "P": sizes.head_dim, "G": groups, "N": sizes.d_state, "BN": max(16, triton.next_power_of_2(sizes.d_state)),
        "C": chunk_of(row),
    }  # fmt: skip


def _by_one_warp(row: Tensor, constants: dict[str, Any]) -> bool:
    """Whether kernels of one warp a program run: in 16 bit, where rows consist of 16 bytes."""
    return row.dtype != torch.float32 and constants["N"] % 8 == 0 and constants["H"] // constants["G"] <= MOST_HEADS


def _forward_form(row: Tensor, weights: Weights, sizes: Sizes) -> tuple[Any, dict[str, Any]]:
    """The kernel of the forward pass and its constants."""
    constants = _constants(row, weights, sizes)
    if not _by_one_warp(row, constants):
        from kernels.narrow.ssd_forward_triton import ssd_forward

        return ssd_forward, constants | FORWARD[constants["BN"]].options()
    from kernels.narrow.ssd_forward_gluon import ssd_forward

    return ssd_forward, constants | {"WHOLE": row.shape[1] % CHUNK == 0, "num_warps": 1}


def _backward_form(row: Tensor, weights: Weights, sizes: Sizes) -> tuple[Any, dict[str, Any]]:
    """The same of the backward pass."""
    constants = _constants(row, weights, sizes)
    if not _by_one_warp(row, constants):
        from kernels.narrow.ssd_backward_triton import ssd_backward

        return ssd_backward, constants | BACKWARD.options() | {"BP": min(COLUMNS, sizes.head_dim)}
    from kernels.narrow.ssd_backward_gluon import ssd_backward

    heads = triton.next_power_of_2(constants["H"] // constants["G"])
    return ssd_backward, constants | {"HEADS": heads, "WHOLE": row.shape[1] % CHUNK == 0, "num_warps": 1}


def forward(row_BTR: Tensor, weights: Weights, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [B, T, H P], and what `backward` needs: convolved rows [B, T, W] and the states behind chunks."""
    (batch, length, _), (members, width, _) = row_BTR.shape, weights.taps.shape
    row, heads = even_rows(row_BTR), weights.skip.shape[1]
    xbc = conv_triton.forward(row[..., :width], weights.taps, weights.bias, silu=True)
    y = row.new_empty(batch, length, heads * sizes.head_dim)
    kept = row.new_empty(kept_shape(row, weights, sizes))
    kernel, constants = _forward_form(row, weights, sizes)
    kernel[(batch * heads,)](
        xbc, row[..., width:], *(w.contiguous() for w in weights[2:]), y, kept, length, batch // members, row.stride(1), **constants
    )
    return y, xbc, kept


def _aligned(x: Tensor) -> Tensor:
    """Contiguous numbers, 16 bytes of which are copied at a time."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def backward(
    dy_BTE: Tensor, beside: Tensor | None, row_BTR: Tensor, xbc_BTW: Tensor, kept: Tensor, weights: Weights, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the rows, of taps and bias of the convolution, and of log rate, bias and skip of each head, [3, M, H].

    Given are those of the outputs and, if they have one, of the convolved rows.
    """
    from kernels.narrow.ssd_forward_triton import ssd_behind

    (batch, length, _), (members, width, _) = row_BTR.shape, weights.taps.shape
    row, dy, heads = even_rows(row_BTR), _aligned(dy_BTE.contiguous()), weights.skip.shape[1]
    step_bias, log_rate, skip = (w.contiguous() for w in weights[2:])
    raw, per_member = row[..., width:], batch // members
    dkept, chunks = torch.empty_like(kept), kept.shape[2] + 1
    if chunks > 1:
        ssd_behind[(batch * heads,)](
            xbc_BTW, dy, raw, step_bias, log_rate, dkept, length, per_member, row.stride(1),
            **_constants(row, weights, sizes), **BEHIND.options(),
        )  # fmt: skip
    drow, dxbc = row.new_empty(row.shape), torch.empty_like(xbc_BTW)
    drow[..., width + heads :].zero_()
    parts = row.new_empty(members, per_member * chunks, 3, heads, dtype=torch.float32)
    kernel, constants = _backward_form(row, weights, sizes)
    kernel[(batch * chunks * constants["G"],)](
        xbc_BTW, dy, raw, step_bias, log_rate, skip, kept, dkept, dxbc, drow[..., width:], parts,
        length, per_member, row.stride(1), drow.stride(1), **constants,
    )  # fmt: skip
    if beside is not None:
        dxbc += beside
    _, dtaps, dbias = conv_backward_triton.backward(
        dxbc, row[..., :width], weights.taps, weights.bias, silu=True, out=drow[..., :width]
    )
    return drow, dtaps, dbias, parts.sum(1).transpose(0, 1).contiguous()
