"""Launches the kernels of `kernels.walks.short_rows_triton`: where they are faster, and how they are compiled.

Shape legend: B batch, T time, H heads of v, G heads of q and k, C tokens of a tile, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kernels.operands import _dot_dtype, _gate_kind, _precision, _rows, _triton_dtype, product_width
from kernels.walks.walk_decays import gate_every, gate_of, of_given

if TYPE_CHECKING:
    from kernels.walks.walk import Inputs

LONGEST = {64: 256, 128: 128}
"""The most tokens of a short row, by the larger of K and V, the first at least as large."""
DTYPES = (torch.bfloat16, torch.float16)


class Config(NamedTuple):
    """How a kernel is compiled.

    Args:
        tokens: of a tile.
        tile: columns of the values of a program, or all of them backward.
        warps: warps of a program.
        stages: depth of the pipeline that loads other tiles.
        registers: most registers of a thread, None for as many as the compiler likes.
    """

    tokens: int
    tile: int
    warps: int
    stages: int
    registers: int | None = None
    step: int = 64


JOINT, PAIRS = True, 0
FORWARD = {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2)}
BACKWARD = {64: Config(64, 64, 4, 2), 128: Config(64, 128, 8, 1)}
"""By the larger of K and V."""


def suits(inputs: Inputs, *, return_state: bool) -> bool:
    """Whether rows are short, products of 16 bit, and no state enters or leaves them."""
    q, k, v, _, state, starts = inputs
    whole = state is None and starts is None and not return_state
    return whole and v.shape[1] <= longest(k, v) and _dot_dtype(q, k, v) in DTYPES


def longest(k_BTGK: Tensor, v_BTHV: Tensor) -> int:
    """The most tokens of a short row."""
    wide = max(k_BTGK.shape[3], v_BTHV.shape[3])
    return next((most for width, most in LONGEST.items() if wide <= width), 0)


def _constants(inputs: Inputs, unit: int, config: Config) -> dict[str, Any]:
    """What both kernels are compiled for, but for their columns."""
    k, v = inputs.k, inputs.v
    return {
        "K": k.shape[3], "V": v.shape[3], "BK": product_width(k.shape[3], v.dtype), "UNIT": unit, "C": config.tokens,
        "GATE": _gate_kind(inputs.log_decay), "ALONE": v.shape[1] <= config.tokens, "DOT": _triton_dtype(v.dtype), "PRECISION": _precision(v.dtype),
        "STAGES": config.stages, "STEP": config.step, "num_warps": config.warps, "maxnreg": config.registers,
    }  # fmt: skip


def _config(table: dict[int, Config], inputs: Inputs) -> Config:
    wide = max(inputs.k.shape[3], inputs.v.shape[3])
    return next(config for width, config in table.items() if wide <= width)


def forward(narrow: tuple[Tensor, ...], inputs: Inputs, o: Tensor) -> None:
    """See `kernels.walks.walk.forward`; `narrow` are q, k and v in the dtype of the products, `o` is written."""
    from kernels.walks.short_rows_triton import forward_kernel

    (q, k, v), strides, unit = _rows(*narrow)
    (batch, length, heads, v_dim), config = v.shape, _config(FORWARD, inputs)
    tile = min(config.tile, product_width(v_dim, v.dtype))
    programs = batch * heads * -(-length // config.tokens) * -(-v_dim // tile)
    kernel, more = forward_kernel, {}
    if PAIRS:
        from kernels.walks.short_rows_triton import pairs_kernel

        kernel, more = pairs_kernel, {"N": PAIRS, "MOST": 512, "ALONE": False}
    kernel[(programs,)](
        q, k, v, gate_of(inputs.log_decay, v), o,
        *strides, length, heads, heads // k.shape[2], gate_every(inputs.log_decay, batch),
        **(_constants(inputs, unit, config) | {"BV": tile} | more),
    )  # fmt: skip


def backward(narrow: tuple[Tensor, ...], inputs: Inputs, dv: Tensor, *, gate_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries and keys [B, T, G, K], and of the log decays, or an empty tensor.

    `narrow` are q, k, v and do in the dtype of the products; `dv` is written.
    """
    from kernels.walks.short_rows_triton import backward_kernel

    if not JOINT:
        narrow = (*(x.repeat_interleave(inputs.v.shape[2] // x.shape[2], 2) if x.shape[2] > 1 else x.expand(-1, -1, inputs.v.shape[2], -1) for x in narrow[:2]), *narrow[2:])
    (q, k, v, do), strides, unit = _rows(*narrow)
    (batch, length, heads, v_dim), config = v.shape, _config(BACKWARD, inputs)
    groups = k.shape[2]
    dq, dk = (x.new_empty(x.shape) for x in (q, k))
    dgate = v.new_empty((batch, length, heads) if gate_grad else 0, dtype=torch.float32)
    backward_kernel[(batch * groups * -(-length // config.tokens),)](
        q, k, v, gate_of(inputs.log_decay, v), do, dq, dk, dv, dgate,
        *strides, length, heads, heads // groups, gate_every(inputs.log_decay, batch),
        **_constants(inputs, unit, config), BV=product_width(v_dim, v.dtype), GATE_GRAD=gate_grad, SHARED=groups < heads,
    )  # fmt: skip
    return dq, dk, of_given(dgate, inputs.log_decay) if gate_grad else dgate
