"""The scans as custom operators: fake, autograd and vmap rules around their Triton kernels.

Shape legend: B batch, T time, D channels, N state size, M members (each B / M sequences), S borders of tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels._ahead import Sizes
from kernels._members import fold_members
from kernels._operator import operator

TILE = 16
"""Tokens between two stored states."""
CHANNELS = 32
"""Channels of a program: a lane of a warp has one."""
FULL = 800
"""Warps of 32 channels each, in all sequences, that fill a device."""
KEPT_EACH, OWN_STATES = 4, (8, 16, 24)
"""Tokens between two stored states where threads own channels, and how many states a channel has there."""


def threads_own_channels(x_BTD: Tensor, b_BTN: Tensor, *, gated: bool) -> bool:
    """Whether a thread owns a channel with all its states backward too, for which states are kept often, in bf16 as [B, S, D, N].

    Their kernels mask nothing and sum over channels in bf16, and there are none for gates. Of more than 16 states a sequence keeps
    each launch's apart (`kernels.scans.selective_scan_columns_launch`).
    """
    batch, length, width = x_BTD.shape
    whole = length % TILE == 0 and width % CHANNELS == 0 and b_BTN.shape[2] in OWN_STATES
    return whole and not gated and b_BTN.dtype in (torch.bfloat16, torch.float16) and batch * width // CHANNELS >= FULL


@operator("mixer_bench::selective_scan")
def selective_scan_operator(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    start_BDN: Tensor | None,
    bias_MD: Tensor | None,
    skip_MD: Tensor | None,
    gate_BTD: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.scan.selective_scan` for M members with rates of their own, their sequences one after the other.

    With a bias, skip and gate it is `gated_selective_scan`. With a bias, or that and a skip, dt comes before bias and softplus and
    skip x joins the outputs; only where `threads_own_channels`.

    Returns:
        The outputs [B, T, D] in the dtype of x; in fp32 the final state [B, D, N], and, to keep for the backward pass, the states
        at the borders of tiles [B, S, N, D], else nothing; what is kept differs where `threads_own_channels`. Last, with a bias
        and no gate, the time steps, or nothing.
    """
    from kernels.scans import selective_scan_columns_launch as columns
    from kernels.scans.selective_scan_launch import forward, gate_of

    with torch.cuda.device_of(x_BTD):  # Triton launches on the current device
        if bias_MD is not None and gate_BTD is None:
            found = columns.forward(x_BTD, dt_BTD, bias_MD, skip_MD, rate_MDN, b_BTN, c_BTN, start_BDN)
            return found if keep else (*found[:2], found[1].new_empty(_none_kept(found[1])), found[3])
        found = forward(x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN, start_BDN, gate_of(bias_MD, skip_MD, gate_BTD), keep=keep)
        return *found, x_BTD.new_empty(0)


def _none_kept(final_BDN: Tensor) -> tuple[int, ...]:
    batch, width, n_states = final_BDN.shape
    return batch, 0, n_states, width


@operator("mixer_bench::selective_scan_backward")
def _backward_operator(
    dy_BTD: Tensor,
    dfinal_BDN: Tensor | None,
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    bias_MD: Tensor | None,
    skip_MD: Tensor | None,
    gate_BTD: Tensor | None,
    states_BSND: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, rate, b, c, the initial state, and of bias, skip and gate, which are empty where there are none.

    With a bias and no gate dt are the steps that the forward pass made, and their place has what came before, in the dtype of x.
    """
    from kernels.scans import selective_scan_columns_launch as columns
    from kernels.scans.selective_scan_launch import backward, gate_of

    with torch.cuda.device_of(dy_BTD):  # Triton launches on the current device
        if bias_MD is not None and gate_BTD is None:
            scanned = (dy_BTD, dfinal_BDN, x_BTD, dt_BTD, bias_MD, skip_MD, rate_MDN, b_BTN, c_BTN, states_BSND)
            return *columns.backward(*scanned), x_BTD.new_empty(0)
        gate = gate_of(bias_MD, skip_MD, gate_BTD)
        return backward(dy_BTD, dfinal_BDN, x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN, states_BSND, gate)


@selective_scan_operator.register_fake
def _(x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN, start_BDN, bias_MD, skip_MD, gate_BTD, keep) -> tuple[Tensor, ...]:
    batch, length, width = x_BTD.shape
    n_states = rate_MDN.shape[-1]
    final_BDN = x_BTD.new_empty(batch, width, n_states, dtype=torch.float32)
    if keep and threads_own_channels(x_BTD, b_BTN, gated=gate_BTD is not None):
        kept = x_BTD.new_empty(batch, length // KEPT_EACH + 1, width, n_states, dtype=torch.bfloat16)
    else:
        kept = final_BDN.new_empty(batch, (length + TILE - 1) // TILE + 1 if keep else 0, n_states, width)
    steps = final_BDN.new_empty(x_BTD.shape if bias_MD is not None and gate_BTD is None else 0)
    return x_BTD.new_empty(x_BTD.shape), final_BDN, kept, steps if steps.numel() else x_BTD.new_empty(0)


@_backward_operator.register_fake
def _(dy_BTD, dfinal_BDN, x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN, bias_MD, skip_MD, gate_BTD, states_BSND) -> tuple[Tensor, ...]:
    of_dt = x_BTD if bias_MD is not None and gate_BTD is None else dt_BTD
    dx, ddt, drate, db, dc = (tensor.new_empty(tensor.shape) for tensor in (x_BTD, of_dt, rate_MDN, b_BTN, c_BTN))
    around = (x_BTD.new_empty(0 if tensor is None else tensor.shape) for tensor in (bias_MD, skip_MD, gate_BTD))
    dbias, dskip, dgate = (
        found if tensor is None else found.to(tensor.dtype)
        for found, tensor in zip(around, (bias_MD, skip_MD, gate_BTD), strict=True)
    )
    dstart = x_BTD.new_empty(x_BTD.shape[0], *rate_MDN.shape[1:], dtype=torch.float32)
    return dx, ddt, drate, db, dc, dstart, dbias, dskip, dgate


def _save(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    x_BTD, dt_BTD, *scanned, start_BDN, bias_MD, skip_MD, gate_BTD, _ = inputs
    ctx.start_dtype, ctx.dt_dtype = None if start_BDN is None else start_BDN.dtype, dt_BTD.dtype
    stepped = bias_MD is not None and gate_BTD is None
    ctx.save_for_backward(x_BTD, output[3] if stepped else dt_BTD, *scanned, bias_MD, skip_MD, gate_BTD, output[2])


def _differentiate(ctx, dy_BTD: Tensor | None, dfinal_BDN: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dy_BTD = torch.zeros_like(tensors[0]) if dy_BTD is None else dy_BTD
    dx_BTD, ddt_BTD, *scanned, dstart_BDN, dbias_MD, dskip_MD, dgate_BTD = _backward_operator(dy_BTD, dfinal_BDN, *tensors)
    dstart = None if ctx.start_dtype is None else dstart_BDN.to(ctx.start_dtype)
    around = zip((dbias_MD, dskip_MD, dgate_BTD), tensors[5:8], strict=True)
    return dx_BTD, ddt_BTD.to(ctx.dt_dtype), *scanned, dstart, *(None if of is None else found for found, of in around), None


selective_scan_operator.register_autograd(_differentiate, setup_context=_save, keep=True)


@selective_scan_operator.register_sizes
def _(x_BTD, dt_BTD, rate_MDN, b_BTN, c_BTN, start_BDN, bias_MD, skip_MD, gate_BTD, keep) -> list[tuple[Any, ...]]:
    """Few channels are scanned by kernels of their own, and long rows of them in segments; whole tiles that fill a device too.

    Raw time steps without a gate always take the last.
    """
    if bias_MD is not None and gate_BTD is None:
        return []
    width = x_BTD.shape[2]
    found = []
    for sizes in (
        Sizes(1, 16, 1, 1),
        Sizes(1, 4096, 1, 1),
        Sizes(1024, TILE + 1, 1, 1),
        Sizes(-(-FULL * CHANNELS // width), TILE, 1, 1),
    ):
        # most kernels ask only whether 16 divides the channels, those of whole tiles take them for a constant
        channels = width if sizes.T == TILE and sizes.B > 1 else min(width, 64 + width % 16)
        rate_DN, bias_D, skip_D = (None if x is None else x[:1, :channels] for x in (rate_MDN, bias_MD, skip_MD))
        x, dt, gate = (sizes.of(None if t is None else t[..., :channels], "BT") for t in (x_BTD, dt_BTD, gate_BTD))
        b, c = sizes.of(b_BTN, "BT"), sizes.of(c_BTN, "BT")
        start = sizes.of(None if start_BDN is None else start_BDN[:, :channels], "B")
        found.append((x, dt, rate_DN, b, c, start, bias_D, skip_D, gate, keep))
    return found


@selective_scan_operator.register_vmap
def _(info, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    *tensors, keep = arguments
    outputs = selective_scan_operator(*_folded(info, in_dims[:-1], tensors), keep)
    empty = [out.ndim == 1 for out in outputs]  # no time steps
    parts = tuple(out if none else out.unflatten(0, (info.batch_size, -1)) for out, none in zip(outputs, empty, strict=True))
    return parts, tuple(None if none else 0 for none in empty)


@operator("mixer_bench::scan")
def scan_operator(a_BTD: Tensor, x_BTD: Tensor, start_BD: Tensor | None) -> Tensor:
    """`kernels.scan.scan` with one axis of channels; the states [B, T, D] in the dtype of x, computed in fp32."""
    from kernels.scans.scan_triton import forward

    with torch.cuda.device_of(a_BTD):  # Triton launches on the current device
        return forward(a_BTD, x_BTD, start_BD)


@operator("mixer_bench::scan_backward")
def _scan_backward_operator(dh_BTD: Tensor, a_BTD: Tensor, h_BTD: Tensor, start_BD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state."""
    from kernels.scans.scan_triton import backward

    with torch.cuda.device_of(dh_BTD):  # Triton launches on the current device
        return backward(dh_BTD, a_BTD, h_BTD, start_BD)


@scan_operator.register_fake
def _(a_BTD: Tensor, x_BTD: Tensor, start_BD: Tensor | None) -> Tensor:
    return x_BTD.new_empty(x_BTD.shape)


@_scan_backward_operator.register_fake
def _(dh_BTD: Tensor, a_BTD: Tensor, h_BTD: Tensor, start_BD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dstart_BD = h_BTD.new_empty(h_BTD.shape[0], h_BTD.shape[2], dtype=torch.float32)
    return a_BTD.new_empty(a_BTD.shape), h_BTD.new_empty(h_BTD.shape), dstart_BD


def _save_states(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output, inputs[2])


def _differentiate_states(ctx, dh_BTD: Tensor) -> tuple[Tensor | None, ...]:
    a_BTD, h_BTD, start_BD = ctx.saved_tensors
    da_BTD, dx_BTD, dstart_BD = _scan_backward_operator(dh_BTD, a_BTD, h_BTD, start_BD)
    return da_BTD, dx_BTD, None if start_BD is None else dstart_BD.to(start_BD.dtype)


scan_operator.register_autograd(_differentiate_states, setup_context=_save_states)


@scan_operator.register_sizes
def _(a_BTD: Tensor, x_BTD: Tensor, start_BD: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """Long rows of few channels are scanned in segments."""
    long = Sizes(1, 4096, 1, 1)
    few = [None if x is None else x[..., :64] for x in (a_BTD, x_BTD, start_BD)]
    return [tuple(long.of(x, "BT" if number < 2 else "B") for number, x in enumerate(few))]


@scan_operator.register_vmap
def _(info, in_dims: tuple[int | None, ...], *arguments: Tensor | None) -> tuple[Tensor, int]:
    return scan_operator(*_folded(info, in_dims, arguments)).unflatten(0, (info.batch_size, -1)), 0


def _folded(info, in_dims: tuple[int | None, ...], arguments: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(arguments, in_dims, strict=True)
    return [None if tensor is None else fold_members(tensor, axis, info.batch_size) for tensor, axis in pairs]
