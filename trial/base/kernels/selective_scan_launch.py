"""Launches the kernels of Mamba's selective scan: `selective_scan_gluon` forward, `selective_scan_triton` backward.

Shape legend: B batch, T time, D channels, N state size, M members (each B / M sequences), S borders of tiles, P blocks of channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels import selective_scan_gluon
from kernels._members import even_rows
from kernels.parts_triton import add_parts
from kernels.scan_operator import CHANNELS, TILE
from kernels.selective_scan_triton import selective_scan_backward
from kernels.selective_scan_turn_triton import turned

WARPS = 2
"""Warps of a forward program, unless there are fewer channels."""
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
    batch, length, width = x_BTD.shape
    n_states, n_tiles = rate_MDN.shape[-1], -(-length // TILE)
    states_BSND = x_BTD.new_empty(batch, n_tiles + 1 if keep else 0, n_states, width, dtype=torch.float32)
    final_BDN = x_BTD.new_empty(batch, width, n_states, dtype=torch.float32)
    y_BTD = x_BTD.new_empty(batch, length, width)
    x_BTD = x_BTD.contiguous()
    around, stride = _around(gate, x_BTD)
    padded, warps = triton.next_power_of_2(n_states), min(WARPS, triton.next_power_of_2(-(-width // CHANNELS)))
    channels = warps * selective_scan_gluon.channels_of_a_warp(padded)
    selective_scan_gluon.selective_scan_forward[(batch * -(-width // channels),)](
        x_BTD, dt_BTD.contiguous(), rate_MDN.contiguous(), b_BTN.contiguous(), c_BTN.contiguous(), *around,
        final_BDN if start_BDN is None else start_BDN.contiguous(), y_BTD, states_BSND, final_BDN,
        stride, length, width, n_states, n_tiles, batch // rate_MDN.shape[0],
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
    """See `kernels.scan_operator`; each gradient in the dtype of its tensor, that of the initial state in fp32."""
    batch, length, width = x_BTD.shape
    members, _, n_states = rate_MDN.shape
    n_tiles, n_blocks = -(-length // TILE), -(-width // CHANNELS)
    row, dots = n_tiles * TILE, b_BTN.dtype != torch.float32

    def parts(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x_BTD.new_empty(*sizes, dtype=dtype)

    dx_BTD, ddt_BTD, dstart_BDN = x_BTD.new_empty(x_BTD.shape), dt_BTD.new_empty(dt_BTD.shape), parts(batch, width, n_states)
    kept_BND, drate_BND, dstate_BND = (parts(batch, n_states, width) for _ in range(3))
    # in 16 bit a part of 32 channels is rounded like any of the results; the sum of all parts is made in fp32
    db_PBNT, dc_PBNT = (parts(n_blocks, batch, n_states, row, dtype=torch.bfloat16 if dots else torch.float32) for _ in range(2))
    dgate_BTD = dx_BTD if gate is None else gate.gate_BTD.new_empty(batch, length, width)
    around_B2D = drate_BND if gate is None else parts(batch, 2, width)
    x_BTD = x_BTD.contiguous()
    around, stride = _around(gate, x_BTD)
    selective_scan_backward[(batch * n_blocks,)](
        dy_BTD.contiguous(), x_BTD, dt_BTD.contiguous(), rate_MDN.contiguous(), *turned(b_BTN, c_BTN, TILE), *around,
        states_BSND.contiguous(), dstart_BDN if dfinal_BDN is None else dfinal_BDN.contiguous(),
        dx_BTD, ddt_BTD, drate_BND, db_PBNT, dc_PBNT, dgate_BTD, around_B2D, dstart_BDN, kept_BND, dstate_BND,
        stride, length, width, n_states, n_tiles, batch, batch // members,
        GATED=gate is not None, FINAL=dfinal_BDN is not None, TILE=TILE, CHANNELS=CHANNELS, DOTS=dots, ASK=ASK, num_warps=1,
    )  # fmt: skip
    drate_MDN, db_BTN, dc_BTN = (x.new_empty(x.shape) for x in (rate_MDN, b_BTN, c_BTN))
    add_parts((drate_BND,), (drate_MDN,), (n_states * width, batch // members * n_states * width), batch // members)
    for parts_PBNT, sum_BTN in ((db_PBNT, db_BTN), (dc_PBNT, dc_BTN)):
        sum_BTN.copy_(parts_PBNT.sum(0, dtype=torch.float32)[..., :length].mT)
    found = dx_BTD, ddt_BTD, drate_MDN, db_BTN, dc_BTN, dstart_BDN
    if gate is None:
        return *found, *(x_BTD.new_empty(0) for _ in range(3))
    dbias_MD, dskip_MD = gate.bias_MD.new_empty(members, width), gate.skip_MD.new_empty(members, width)
    sides = (around_B2D, around_B2D[:, 1:]), (dbias_MD[..., None], dskip_MD[..., None])
    add_parts(*sides, (2 * width, batch // members * 2 * width), batch // members)
    return *found, dbias_MD, dskip_MD, dgate_BTD


def _around(gate: Gate | None, x_BTD: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """The kernels' tensors of a gate, and the distance of its tokens; x in their places if there is none."""
    if gate is None:
        return (x_BTD, x_BTD, x_BTD), 0
    gate_BTD = even_rows(gate.gate_BTD)
    return (gate.bias_MD.contiguous(), gate.skip_MD.contiguous(), gate_BTD), gate_BTD.stride(1)
