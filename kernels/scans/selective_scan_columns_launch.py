"""Launches the kernels of Mamba's selective scan where threads own channels: `selective_scan_columns_forward` and the columns back.

A launch takes 16 states of each channel, or 8. All results but those of single states are sums over states, so of 24 a second
launch takes what is left and adds to what the first has stored. What is of the channels alone, softplus and skip, is the first's.

Shape legend: B batch, T time, D channels, N state size, M members (each B / M sequences), S kept states.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels._members import even_rows
from kernels.between.parts_triton import MANY, add_dense_parts, add_parts
from kernels.scans import selective_scan_columns, selective_scan_columns_forward
from kernels.scans.scan_operator import CHANNELS, KEPT_EACH, TILE
from kernels.scans.selective_scan_gluon import ROW_UNIT

GROUP = 16
"""Most states of a launch."""
WARPS, REGISTERS = 4, 128
"""Warps of a forward program, unless there are fewer channels, and registers of its threads."""
BACK_TILE, BACK_REGISTERS = 8, {16: None, 8: 168}
"""Tokens of a tile backward, and by states the registers of a thread: with 168 twelve programs fit an SM."""


def forward(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    bias_MD: Tensor | None,
    skip_MD: Tensor | None,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    start_BDN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, the final state, states before each `KEPT_EACH` tokens as [B, S, D, N] in bf16, and time steps.

    With a bias dt comes before that and a softplus; with a skip that times x joins the outputs.
    """
    batch, length, width = x_BTD.shape
    n_states = rate_MDN.shape[-1]
    kept_BSDN = x_BTD.new_empty(batch, length // KEPT_EACH + 1, width, n_states, dtype=torch.bfloat16)
    final_BDN = x_BTD.new_empty(batch, width, n_states, dtype=torch.float32)
    y_BTD, start = x_BTD.new_empty(batch, length, width), final_BDN if start_BDN is None else start_BDN.contiguous()
    x_BTD, dt_BTD, rate_MDN = (x.contiguous() for x in (x_BTD, dt_BTD, rate_MDN))
    steps_BTD = dt_BTD if bias_MD is None else x_BTD.new_empty(x_BTD.shape, dtype=torch.float32)
    b_BTN, c_BTN, row_stride = _rows_of(b_BTN, c_BTN)
    warps = min(WARPS, triton.next_power_of_2(width // CHANNELS))
    channels = warps * CHANNELS
    for first in range(0, n_states, GROUP):
        rate, b, c, before, final = (_group(x, first) for x in (rate_MDN, b_BTN, c_BTN, start, final_BDN))
        selective_scan_columns_forward.columns_forward[(batch * -(-width // channels),)](
            x_BTD, steps_BTD if first else dt_BTD, *_sides(bias_MD, skip_MD, rate_MDN), rate, b, c, before,
            y_BTD, steps_BTD, _kept(kept_BSDN, first), final, row_stride, length, length // TILE, batch // rate_MDN.shape[0],
            WIDTH=width, STEPPED=bias_MD is not None and not first, SKIP=skip_MD is not None and not first,
            START=start_BDN is not None, ADD=first > 0, EACH=KEPT_EACH,
            ALL=n_states, N=rate.shape[-1], C=channels, L=TILE, WARPS=warps,
            num_warps=warps, maxnreg=REGISTERS,
        )  # fmt: skip
    return y_BTD, final_BDN, kept_BSDN, steps_BTD


def backward(
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
    """Gradients of x, dt, rate, b, c, the initial state, bias and skip; empty of what is not given.

    With a bias dt are the time steps that the forward pass made, and their gradient is that of what came before, in the dtype of x.
    One pass, or two of different states, make all but the sums over blocks of channels and over a member's sequences.
    """
    batch, length, width = x_BTD.shape
    n_states, n_blocks, each = rate_MDN.shape[-1], width // CHANNELS, batch // rate_MDN.shape[0]
    of_dt = dt_BTD if bias_MD is None else x_BTD
    dx_BTD, ddt_BTD, drate_MDN, db_BTN, dc_BTN = (x.new_empty(x.shape) for x in (x_BTD, of_dt, rate_MDN, b_BTN, c_BTN))
    dbias_MD = x_BTD.new_empty(0) if bias_MD is None else bias_MD.new_empty(bias_MD.shape)
    dskip_MD = x_BTD.new_empty(0) if skip_MD is None else skip_MD.new_empty(skip_MD.shape)
    dbias_BD, dskip_BD = (x_BTD.new_empty(batch, width, dtype=torch.float32) for _ in range(2))
    dstart_BDN = x_BTD.new_empty(batch, width, n_states, dtype=torch.float32)
    drate_BND = x_BTD.new_empty(batch, n_states, width, dtype=torch.float32)
    final = dstart_BDN if dfinal_BDN is None else dfinal_BDN.contiguous()
    dy_BTD, x_BTD, dt_BTD, rate_MDN, kept_BSDN = (x.contiguous() for x in (dy_BTD, x_BTD, dt_BTD, rate_MDN, kept_BSDN))
    b_BTN, c_BTN, row_stride = _rows_of(b_BTN, c_BTN)
    for first in range(0, n_states, GROUP):
        rate, b, c, dfinal, dstart, db, dc = (_group(x, first) for x in (rate_MDN, b_BTN, c_BTN, final, dstart_BDN, db_BTN, dc_BTN))
        # a part of 32 channels is rounded like any of the results; the sum of all parts is made in fp32
        db_parts, dc_parts = (x_BTD.new_empty(n_blocks, *b.shape, dtype=torch.bfloat16) for _ in range(2))
        selective_scan_columns.columns_backward[(batch * n_blocks,)](
            dy_BTD, x_BTD, dt_BTD, _sides(bias_MD, skip_MD, rate_MDN)[1], rate, b, c, _kept(kept_BSDN, first), dfinal,
            dx_BTD, ddt_BTD, drate_BND[:, first:], db_parts, dc_parts, dstart, dbias_BD, dskip_BD,
            row_stride, length, length // BACK_TILE, batch, each,
            WIDTH=width, STEPPED=bias_MD is not None, SKIP=skip_MD is not None and not first, FINAL=dfinal_BDN is not None,
            ADD=first > 0, ALL=n_states, N=rate.shape[-1], EACH=KEPT_EACH, L=BACK_TILE,
            num_warps=1, maxnreg=BACK_REGISTERS[rate.shape[-1]],
        )  # fmt: skip
        add_dense_parts((db_parts, dc_parts), (db, dc))
    add_parts((drate_BND,), (drate_MDN,), (n_states * width, each * n_states * width), each)
    for of_each, found in ((dbias_BD, dbias_MD), (dskip_BD, dskip_MD)):
        if found.numel():
            add_parts((of_each[:, None],), (found[..., None],), (width, each * width), each, at_once=MANY)
    return dx_BTD, ddt_BTD, drate_MDN, db_BTN, dc_BTN, dstart_BDN, dbias_MD, dskip_MD


def _group(x: Tensor, first: int) -> Tensor:
    """The states of the launch that starts with one of them, of the last axis."""
    return x[..., first : first + GROUP]


def _kept(kept_BSDN: Tensor, first: int) -> Tensor:
    """Where the launch that starts with this state keeps its own: each sequence those of one launch after those of another."""
    _, borders, width, _ = kept_BSDN.shape
    return kept_BSDN.flatten(1)[:, first * borders * width :]


def _sides(bias_MD: Tensor | None, skip_MD: Tensor | None, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Bias and skip as kernels take them; where there is none another tensor, which is not read."""
    return (spare if bias_MD is None else bias_MD.contiguous()), (spare if skip_MD is None else skip_MD.contiguous())


def _rows_of(b_BTN: Tensor, c_BTN: Tensor) -> tuple[Tensor, Tensor, int]:
    """B and c as parts of wider rows where both lie alike in such, and the distance of their tokens in units of `ROW_UNIT`."""
    b, c = even_rows(b_BTN), even_rows(c_BTN)
    unit = ROW_UNIT.value
    if b.stride(1) != c.stride(1) or b.stride(1) % unit:
        b, c = b_BTN.contiguous(), c_BTN.contiguous()
    return b, c, b.stride(1) // unit
