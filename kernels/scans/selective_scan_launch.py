"""Launches the kernels of Mamba's selective scan: `selective_scan_gluon` forward, `selective_scan_triton` backward.

Whole tiles of channels that fill a device take `selective_scan_columns_launch`, whose threads own a channel with all its states in
both passes. Where channels do not fill a device, `selective_scan_quads_forward` and
`selective_scan_quads_backward` take their place: four lanes have a channel, and where even these are few, a program has a segment
of time (`selective_scan_segments`).

Shape legend: B batch, T time, D channels, N state size, M members (each B / M sequences), S borders of tiles, P blocks of channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels._members import even_rows
from kernels.between.parts_triton import add_parts
from kernels.scans import selective_scan_columns_launch as columns
from kernels.scans import selective_scan_gluon, selective_scan_quads_backward, selective_scan_quads_forward
from kernels.scans.scan_operator import CHANNELS, FULL, TILE, threads_own_channels
from kernels.scans.selective_scan_segments import entering_states, share_out
from kernels.scans.selective_scan_triton import selective_scan_backward
from kernels.scans.selective_scan_turn_triton import turned

WARPS, WARPS_ALONE = 2, 4
"""Warps of a forward program, unless there are fewer channels; and of one that neither keeps states nor has a gate."""
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
    if keep and threads_own_channels(x_BTD, b_BTN, gated=gate is not None):
        return columns.forward(x_BTD, dt_BTD, None, None, rate_MDN, b_BTN, c_BTN, start_BDN)[:3]
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
    padded, most = triton.next_power_of_2(n_states), WARPS if keep or gate is not None else WARPS_ALONE
    warps = min(most, triton.next_power_of_2(-(-width // CHANNELS)))
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
        found = columns.backward(dy_BTD, dfinal_BDN, x_BTD, dt_BTD, None, None, rate_MDN, b_BTN, c_BTN, states_BSND)
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
