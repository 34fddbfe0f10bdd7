"""Launches the kernels of Mamba's selective scan: `selective_scan_gluon` forward, `selective_scan_triton` backward.

Whole tiles of channels that fill a device take `selective_scan_columns_forward` and `selective_scan_columns`, whose threads own a
channel with all its states in both passes. Where channels do not fill a device, `selective_scan_quads_forward` and
`selective_scan_quads_backward` take their place: four lanes have a channel, and where even these are few, a program has a segment
of time (`selective_scan_segments`).

Shape legend: B batch, T time, D channels, N state size, M members (each B / M sequences), S borders of tiles, P blocks of channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from kernels._members import even_rows
from kernels.between.parts_triton import MANY, add_dense_parts, add_parts
from kernels.scans import (
    selective_scan_columns,
    selective_scan_columns_forward,
    selective_scan_gluon,
    selective_scan_quads_backward,
    selective_scan_quads_forward,
)
from kernels.scans.scan_operator import CHANNELS, FULL, KEPT_EACH, KEPT_STATES, TILE, threads_own_channels
from kernels.scans.selective_scan_segments import entering_states, share_out
from kernels.scans.selective_scan_triton import selective_scan_backward
from kernels.scans.selective_scan_turn_triton import turned

WARPS = 2
"""Warps of a forward program, unless there are fewer channels."""
COLUMNS_TILE, COLUMNS_REGISTERS = 8, 128
"""Tokens of a tile backward, and registers of a thread forward, where threads own channels."""
COLUMNS_WARPS, COLUMNS_OWN = 2, 1
NARROW = False
QUAD_WARPS = 4
"""Warps of a program with four lanes for a channel."""
ASK = not triton.knobs.runtime.interpret
"""Whether a tile asks for what the next one reads; the interpreter knows no such instruction."""


class Gate(NamedTuple):
    """What surrounds a scan in Mamba's block, for members with parameters of their own.

    Args:
        bias_MD: of the time steps, before their softplus.
        skip_MD: the inputs' share in the outputs.
        gate_BTD: its SiLU multiplies the outputs.
    """

    bias_MD: Tensor
    skip_MD: Tensor
    gate_BTD: Tensor


def gate_of(bias_MD: Tensor | None, skip_MD: Tensor | None, gate_BTD: Tensor | None) -> Gate | None:
    """All three or nothing."""
    return None if bias_MD is None or skip_MD is None or gate_BTD is None else Gate(bias_MD, skip_MD, gate_BTD)


def few_channels(x_BTD: Tensor, b_BTN: Tensor) -> bool:
    """Whether channels get four lanes each, whose sums are made of factors in 16 bit."""
    warps = x_BTD.shape[0] * -(-x_BTD.shape[2] // CHANNELS)
    return warps < FULL and b_BTN.shape[2] <= 16 and b_BTN.dtype != torch.float32


def stepped_forward(
    x_BTD: Tensor,
    raw_BTD: Tensor,
    bias_MD: Tensor,
    skip_MD: Tensor | None,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    start_BDN: Tensor | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `forward` with time steps softplus(raw + bias), and these in fp32; with skip x added to the outputs."""
    if threads_own_channels(x_BTD, b_BTN, gated=False):
        return _columns_forward(x_BTD, raw_BTD, bias_MD, skip_MD, rate_MDN, b_BTN, c_BTN, start_BDN, keep=keep)
    steps_BTD = F.softplus(raw_BTD.to(torch.float32) + _of_sequences(bias_MD, x_BTD))
    y_BTD, final_BDN, states_BSND = forward(x_BTD, steps_BTD, rate_MDN, b_BTN, c_BTN, start_BDN, None, keep=keep)
    if skip_MD is not None:
        y_BTD += _of_sequences(skip_MD, x_BTD) * x_BTD
    return y_BTD, final_BDN, states_BSND, steps_BTD


def _of_sequences(x_MD: Tensor, like_BTD: Tensor) -> Tensor:
    """Channels of members, [B, 1, D]."""
    return x_MD.repeat_interleave(like_BTD.shape[0] // x_MD.shape[0], 0)[:, None]


def stepped_backward(
    dy_BTD: Tensor,
    dfinal_BDN: Tensor | None,
    x_BTD: Tensor,
    steps_BTD: Tensor,
    bias_MD: Tensor,
    skip_MD: Tensor | None,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    states_BSND: Tensor,
) -> tuple[Tensor, ...]:
    """As `backward`, with the gradient of raw time steps, in the dtype of x, for that of time steps; and those of bias and skip."""
    if threads_own_channels(x_BTD, b_BTN, gated=False):
        return _columns_backward(dy_BTD, dfinal_BDN, x_BTD, steps_BTD, bias_MD, skip_MD, rate_MDN, b_BTN, c_BTN, states_BSND)
    dx_BTD, ddt_BTD, *others = backward(dy_BTD, dfinal_BDN, x_BTD, steps_BTD, rate_MDN, b_BTN, c_BTN, states_BSND, None)
    draw_BTD = ddt_BTD * -torch.expm1(-steps_BTD)
    dbias_MD = draw_BTD.unflatten(0, (bias_MD.shape[0], -1)).sum((1, 2)).to(bias_MD.dtype)
    dskip_MD = x_BTD.new_empty(0)
    if skip_MD is not None:
        dx_BTD += _of_sequences(skip_MD, x_BTD) * dy_BTD
        dskip_MD = (dy_BTD.float() * x_BTD).unflatten(0, (skip_MD.shape[0], -1)).sum((1, 2)).to(skip_MD.dtype)
    return dx_BTD, draw_BTD.to(x_BTD.dtype), *others[:4], dbias_MD, dskip_MD


def forward(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    start_BDN: Tensor | None,
    gate: Gate | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs in the dtype of x; in fp32 the final state [B, D, N] and, if kept, states at tiles' borders [B, tiles + 1, N, D]."""
    if threads_own_channels(x_BTD, b_BTN, gated=gate is not None):
        return _columns_forward(x_BTD, dt_BTD, None, None, rate_MDN, b_BTN, c_BTN, start_BDN, keep=keep)[:3]
    batch, length, width = x_BTD.shape
    n_states, n_tiles = rate_MDN.shape[-1], -(-length // TILE)
    states_BSND = x_BTD.new_empty(batch, n_tiles + 1 if keep else 0, n_states, width, dtype=torch.float32)
    final_BDN = x_BTD.new_empty(batch, width, n_states, dtype=torch.float32)
    y_BTD = x_BTD.new_empty(batch, length, width)
    x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN = (x.contiguous() for x in (x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN))
    around, stride = _around(gate, x_BTD)
    members, start_BDN = rate_MDN.shape[0], None if start_BDN is None else start_BDN.contiguous()
    if few_channels(x_BTD, b_BTN):
        channels = 8 * QUAD_WARPS
        n_blocks = -(-width // channels)
        segments = share_out(batch, n_tiles, n_blocks)
        scanned = x_BTD, dt_BTD, rate_MDN, b_BTN, around, stride
        enters, strides = _entering(scanned, start_BDN, segments, gated=gate is not None, reverse=False)
        selective_scan_quads_forward.quads_forward[(batch * segments[0] * n_blocks,)](
            x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN, *around, enters, y_BTD, states_BSND, final_BDN,
            stride, length, width, n_states, n_tiles, *segments, batch // members, *strides,
            GATED=gate is not None, KEEP=keep, C=channels, L=TILE, WARPS=QUAD_WARPS, num_warps=QUAD_WARPS,
        )  # fmt: skip
        return y_BTD, final_BDN, states_BSND
    padded, warps = triton.next_power_of_2(n_states), min(WARPS, triton.next_power_of_2(-(-width // CHANNELS)))
    channels = warps * selective_scan_gluon.channels_of_a_warp(padded)
    selective_scan_gluon.selective_scan_forward[(batch * -(-width // channels),)](
        x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN, *around,
        final_BDN if start_BDN is None else start_BDN, y_BTD, states_BSND, final_BDN,
        stride, length, width, n_states, n_tiles, batch // members,
        GATED=gate is not None, START=start_BDN is not None, KEEP=keep, N=padded, C=channels, L=TILE, WARPS=warps, num_warps=warps,
    )  # fmt: skip
    return y_BTD, final_BDN, states_BSND


def backward(
    dy_BTD: Tensor,
    dfinal_BDN: Tensor | None,
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    states_BSND: Tensor,
    gate: Gate | None,
) -> tuple[Tensor, ...]:
    """See `kernels.scans.scan_operator`; each gradient in the dtype of its tensor, that of the initial state in fp32."""
    if threads_own_channels(x_BTD, b_BTN, gated=gate is not None):
        found = _columns_backward(dy_BTD, dfinal_BDN, x_BTD, dt_BTD, None, None, rate_MDN, b_BTN, c_BTN, states_BSND)
        return *found[:6], *(x_BTD.new_empty(0) for _ in range(3))
    batch, length, width = x_BTD.shape
    members, _, n_states = rate_MDN.shape
    few, each = few_channels(x_BTD, b_BTN), batch // members
    n_tiles, n_blocks = -(-length // TILE), -(-width // CHANNELS)
    segments = share_out(batch, n_tiles, n_blocks) if few else (1, n_tiles)
    row, dots, parts_of_each = n_tiles * TILE, b_BTN.dtype != torch.float32, each * segments[0]

    def parts(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x_BTD.new_empty(*sizes, dtype=dtype)

    dx_BTD, ddt_BTD, dstart_BDN = x_BTD.new_empty(x_BTD.shape), dt_BTD.new_empty(dt_BTD.shape), parts(batch, width, n_states)
    drate_BND = parts(batch * segments[0], n_states, width)
    # in 16 bit a part of 32 channels is rounded like any of the results; the sum of all parts is made in fp32
    rows = (length, n_states) if few else (n_states, row)
    db_parts, dc_parts = (parts(n_blocks, batch, *rows, dtype=torch.bfloat16 if dots else torch.float32) for _ in range(2))
    dgate_BTD = dx_BTD if gate is None else gate.gate_BTD.new_empty(batch, length, width)
    around_B2D = drate_BND if gate is None else parts(batch * segments[0], 2, width)
    x_BTD, dt_BTD, rate_MDN, dy_BTD = (x.contiguous() for x in (x_BTD, dt_BTD, rate_MDN, dy_BTD))
    dfinal_BDN = None if dfinal_BDN is None else dfinal_BDN.contiguous()
    around, stride = _around(gate, x_BTD)
    outs = dx_BTD, ddt_BTD, drate_BND, db_parts, dc_parts, dgate_BTD, around_B2D, dstart_BDN
    if few:
        b_BTN, c_BTN = b_BTN.contiguous(), c_BTN.contiguous()
        scanned = dy_BTD, dt_BTD, rate_MDN, c_BTN, around, stride
        enters, strides = _entering(scanned, dfinal_BDN, segments, gated=gate is not None, reverse=True)
        selective_scan_quads_backward.quads_backward[(batch * segments[0] * n_blocks,)](
            dy_BTD, x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN, *around, states_BSND.contiguous(), enters, *outs,
            stride, length, width, n_states, n_tiles, *segments, batch, each, *strides,
            GATED=gate is not None, C=CHANNELS, L=TILE, WARPS=QUAD_WARPS, num_warps=QUAD_WARPS,
        )  # fmt: skip
    else:
        kept_BND, dstate_BND = parts(batch, n_states, width), parts(batch, n_states, width)
        selective_scan_backward[(batch * n_blocks,)](
            dy_BTD, x_BTD, dt_BTD, rate_MDN, *turned(b_BTN, c_BTN, TILE), *around,
            states_BSND.contiguous(), dstart_BDN if dfinal_BDN is None else dfinal_BDN, *outs, kept_BND, dstate_BND,
            stride, length, width, n_states, n_tiles, batch, each,
            GATED=gate is not None, FINAL=dfinal_BDN is not None, TILE=TILE, CHANNELS=CHANNELS, DOTS=dots, ASK=ASK, num_warps=1,
        )  # fmt: skip
    drate_MDN, db_BTN, dc_BTN = (x.new_empty(x.shape) for x in (rate_MDN, b_BTN, c_BTN))
    add_parts((drate_BND,), (drate_MDN,), (n_states * width, parts_of_each * n_states * width), parts_of_each)
    for found, sum_BTN in ((db_parts, db_BTN), (dc_parts, dc_BTN)):
        total = found.sum(0, dtype=torch.float32)
        sum_BTN.copy_(total if few else total[..., :length].mT)
    found = dx_BTD, ddt_BTD, drate_MDN, db_BTN, dc_BTN, dstart_BDN
    if gate is None:
        return *found, *(x_BTD.new_empty(0) for _ in range(3))
    dbias_MD, dskip_MD = gate.bias_MD.new_empty(members, width), gate.skip_MD.new_empty(members, width)
    sides = (around_B2D, around_B2D[:, 1:]), (dbias_MD[..., None], dskip_MD[..., None])
    add_parts(*sides, (2 * width, parts_of_each * 2 * width), parts_of_each)
    return *found, dbias_MD, dskip_MD, dgate_BTD


def _columns_forward(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    bias_MD: Tensor | None,
    skip_MD: Tensor | None,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    start_BDN: Tensor | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `forward`, with states before each `KEPT_EACH` tokens as [B, S, D, N] in bf16; with a bias as `stepped_forward`."""
    batch, length, width = x_BTD.shape
    if keep:
        kept = x_BTD.new_empty(batch, length // KEPT_EACH + 1, width, KEPT_STATES, dtype=torch.bfloat16)
    else:
        kept = x_BTD.new_empty(batch, 0, KEPT_STATES, width, dtype=torch.float32)
    final_BDN = x_BTD.new_empty(batch, width, KEPT_STATES, dtype=torch.float32)
    steps_BTD = dt_BTD if bias_MD is None else x_BTD.new_empty(x_BTD.shape, dtype=torch.float32)
    y_BTD, start = x_BTD.new_empty(batch, length, width), final_BDN if start_BDN is None else start_BDN.contiguous()
    x_BTD, dt_BTD, rate_MDN = (x.contiguous() for x in (x_BTD, dt_BTD, rate_MDN))
    b_BTN, c_BTN, row_stride = _rows_of(b_BTN, c_BTN)
    warps, own = COLUMNS_WARPS, COLUMNS_OWN
    channels = warps * CHANNELS * own
    selective_scan_columns_forward.columns_forward[(batch * -(-width // channels),)](
        x_BTD, dt_BTD, *_sides(bias_MD, skip_MD, rate_MDN), rate_MDN, b_BTN, c_BTN, start,
        y_BTD, steps_BTD, kept, final_BDN, row_stride, length, length // TILE, batch // rate_MDN.shape[0],
        WIDTH=width, STEPPED=bias_MD is not None, SKIP=skip_MD is not None, START=start_BDN is not None, KEEP=keep, EACH=KEPT_EACH,
        N=KEPT_STATES, C=channels, L=TILE, WARPS=warps, OWN=own,
        num_warps=warps, maxnreg=COLUMNS_REGISTERS,
    )  # fmt: skip
    return y_BTD, final_BDN, kept, steps_BTD


def _columns_backward(
    dy_BTD: Tensor,
    dfinal_BDN: Tensor | None,
    x_BTD: Tensor,
    dt_BTD: Tensor,
    bias_MD: Tensor | None,
    skip_MD: Tensor | None,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    kept_BSDN: Tensor,
) -> tuple[Tensor, ...]:
    """As `backward` without a gate, or as `stepped_backward` with a bias; gradients of what is not given are empty.

    One pass makes all but the sums over blocks of channels and over a member's sequences.
    """
    batch, length, width = x_BTD.shape
    n_blocks, each = width // CHANNELS, batch // rate_MDN.shape[0]
    of_dt = dt_BTD if bias_MD is None else x_BTD
    dx_BTD, ddt_BTD, drate_MDN, db_BTN, dc_BTN = (x.new_empty(x.shape) for x in (x_BTD, of_dt, rate_MDN, b_BTN, c_BTN))
    dbias_MD = x_BTD.new_empty(0) if bias_MD is None else bias_MD.new_empty(bias_MD.shape)
    dskip_MD = x_BTD.new_empty(0) if skip_MD is None else skip_MD.new_empty(skip_MD.shape)
    dbias_BD, dskip_BD = (x_BTD.new_empty(batch, width, dtype=torch.float32) for _ in range(2))
    dstart_BDN = x_BTD.new_empty(batch, width, KEPT_STATES, dtype=torch.float32)
    drate_BND = x_BTD.new_empty(batch, KEPT_STATES, width, dtype=torch.float32)
    # a part of 32 channels is rounded like any of the results; the sum of all parts is made in fp32
    db_parts, dc_parts = (x_BTD.new_empty(n_blocks, *b_BTN.shape, dtype=torch.bfloat16) for _ in range(2))
    scanned = (x.contiguous() for x in (dy_BTD, x_BTD, dt_BTD))
    b_BTN, c_BTN, row_stride = _rows_of(b_BTN, c_BTN)
    selective_scan_columns.columns_backward[(batch * n_blocks,)](
        *scanned, _sides(bias_MD, skip_MD, rate_MDN)[1], rate_MDN.contiguous(), b_BTN, c_BTN,
        kept_BSDN.contiguous(), dstart_BDN if dfinal_BDN is None else dfinal_BDN.contiguous(),
        dx_BTD, ddt_BTD, drate_BND, db_parts, dc_parts, dstart_BDN, dbias_BD, dskip_BD,
        row_stride, length, length // COLUMNS_TILE, batch, each,
        WIDTH=width, STEPPED=bias_MD is not None, SKIP=skip_MD is not None, FINAL=dfinal_BDN is not None, L=COLUMNS_TILE,
        NARROW=NARROW, num_warps=1,
    )  # fmt: skip
    add_parts((drate_BND,), (drate_MDN,), (KEPT_STATES * width, each * KEPT_STATES * width), each)
    add_dense_parts((db_parts, dc_parts), (db_BTN, dc_BTN))
    for of_each, found in ((dbias_BD, dbias_MD), (dskip_BD, dskip_MD)):
        if found.numel():
            add_parts((of_each[:, None],), (found[..., None],), (width, each * width), each, at_once=MANY)
    return dx_BTD, ddt_BTD, drate_MDN, db_BTN, dc_BTN, dstart_BDN, dbias_MD, dskip_MD


def _sides(bias_MD: Tensor | None, skip_MD: Tensor | None, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Bias and skip as kernels take them; where there is none another tensor, which is not read."""
    return (spare if bias_MD is None else bias_MD.contiguous()), (spare if skip_MD is None else skip_MD.contiguous())


def _rows_of(b_BTN: Tensor, c_BTN: Tensor) -> tuple[Tensor, Tensor, int]:
    """B and c as parts of wider rows where both lie alike in such, and the distance of their tokens in units of `ROW_UNIT`."""
    b, c = even_rows(b_BTN), even_rows(c_BTN)
    unit = selective_scan_gluon.ROW_UNIT.value
    if b.stride(1) != c.stride(1) or b.stride(1) % unit:
        b, c = b_BTN.contiguous(), c_BTN.contiguous()
    return b, c, b.stride(1) // unit


def _entering(
    scanned: tuple[Any, ...], first_BDN: Tensor | None, segments: tuple[int, int], *, gated: bool, reverse: bool
) -> tuple[Tensor, tuple[int, int]]:
    """What enters segments, and its strides of state and channel; see `kernels.scans.selective_scan_segments.entering_states`."""
    x_BTD, _, rate_MDN, *_ = scanned
    if segments[0] > 1:
        return entering_states(*scanned, first_BDN, segments, TILE, gated=gated, reverse=reverse), (x_BTD.shape[2], 1)
    # of nothing the dtype counts, with which the kernel is compiled that takes states in fp32 too
    return (rate_MDN, (0, 0)) if first_BDN is None else (first_BDN, (1, rate_MDN.shape[2]))


def _around(gate: Gate | None, x_BTD: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """The kernels' tensors of a gate, and the distance of its tokens; x in their places if there is none."""
    if gate is None:
        return (x_BTD, x_BTD, x_BTD), 0
    gate_BTD = even_rows(gate.gate_BTD)
    return (gate.bias_MD.contiguous(), gate.skip_MD.contiguous(), gate_BTD), gate_BTD.stride(1)
