"""First-order scans h_t = a_t h_{t-1} + x_t, elementwise: no outer product, a decay of its own for every element.

The torch form pairs neighbours, recurses on half the length and fills the gaps (Blelloch 1990): 3 T multiply-adds in
2 log2(T) steps. It only ever multiplies decays, so factors in [0, 1] cannot overflow, zero included.

Shape legend: B batch, T time, D channels, N state size of a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._arguments import check_arguments, check_axes
from kernels.dispatch import pick
from kernels.gated_norm import gated_norm
from kernels.reference import scan_reference
from kernels.scans.scan_operator import scan_operator, selective_scan_operator, threads_own_channels


def scan(a: Tensor, x: Tensor, state: Tensor | None = None) -> Tensor:
    """Every h_t of h_t = a_t h_{t-1} + x_t.

    Args:
        a: factors, [B, T, ...], the same shape as `x`.
        x: inputs, [B, T, ...].
        state: h_0, [B, ...]; None means zero.

    Returns:
        [B, T, ...].

    Raises:
        ValueError: shapes do not match, or the sequence is empty.
    """
    _refuse_empty(x)
    check_arguments(x, {"a": (a, x.shape), "state": (state, (x.shape[0], *x.shape[2:]))})
    form = pick("scan", x)
    if form == "reference":
        return scan_reference(a, x, state)
    if form == "triton":
        rows = x.shape[:2]
        start_BD = None if state is None else state.reshape(rows[0], -1)
        return scan_operator(a.reshape(*rows, -1), x.reshape(*rows, -1), start_BD).view(x.shape)
    return _states_from(a, x, state)


def _refuse_empty(x: Tensor) -> None:
    if x.ndim < 2 or x.shape[1] == 0:
        raise ValueError(f"x has no tokens in its shape {tuple(x.shape)}; a scan needs [B, T, ...] with at least one")


def _states_from(a: Tensor, x: Tensor, state: Tensor | None) -> Tensor:
    """The torch form of `scan`."""
    if state is not None:
        x = torch.cat((torch.addcmul(x[:, :1], a[:, :1], state[:, None]), x[:, 1:]), dim=1)
    return _scan(a, x)


def _scan(a: Tensor, x: Tensor) -> Tensor:
    length = x.shape[1]
    if length == 1:
        return x
    pairs = length // 2
    a_first, a_second = a[:, 0 : 2 * pairs : 2], a[:, 1::2]
    odd = _scan(a_first * a_second, torch.addcmul(x[:, 1::2], a_second, x[:, 0 : 2 * pairs : 2]))
    later = torch.addcmul(x[:, 2::2], a[:, 2::2], odd[:, : (length - 1) // 2])
    even = torch.cat((x[:, :1], later), dim=1)
    both = torch.stack((even[:, :pairs], odd), dim=2).flatten(1, 2)
    return both if length == 2 * pairs else torch.cat((both, even[:, pairs:]), dim=1)


def selective_scan(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    state_BDN: Tensor | None = None,
    *,
    dt_bias_D: Tensor | None = None,
    skip_D: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mamba's S6: h_t = exp(-dt_t rate) h_{t-1} + (dt_t x_t) b_t^T, y_t = h_t c_t (Gu & Dao 2023, algorithm 2).

    The torch form makes the [B, T, D, N] tensors for a few sequences at a time, so that they stay in cache, and makes them
    again backward, so that none is kept; the Triton form never has them in memory.

    Args:
        x_BTD: input.
        dt_BTD: time steps, >= 0; with a bias, what comes before that and a softplus.
        rate_DN: decay rates, >= 0.
        b_BTN: write vectors.
        c_BTN: read vectors.
        state_BDN: h_0; None means "from zero, and return no state".
        dt_bias_D: bias of the time steps before their softplus; None means that dt is given as it is used.
        skip_D: the input's share in the output; only with a bias.

    Returns:
        The output [B, T, D] in the dtype of x, and the final state in that of the given one, or None.

    Raises:
        ValueError: shapes do not match, the sequence is empty, or a skip has no bias beside it.
    """
    _refuse_empty(x_BTD)
    check_axes("x", x_BTD, "B T D")
    if skip_D is not None and dt_bias_D is None:
        raise ValueError("skip is given without dt_bias; give both, or add skip * x to the output yourself")
    width = x_BTD.shape[2:]
    around = {
        "dt" if dt_bias_D is None else "raw_dt": (dt_BTD, x_BTD.shape),
        "dt_bias": (dt_bias_D, width),
        "skip": (skip_D, width),
    }
    _check_scan(x_BTD, rate_DN, b_BTN, c_BTN, state_BDN, around)
    form = pick("selective_scan", x_BTD)
    kernels = form == "triton"
    if dt_bias_D is not None and not (kernels and threads_own_channels(x_BTD, b_BTN, gated=False)):
        y_BTD, final_BDN = selective_scan(x_BTD, time_steps(dt_BTD, dt_bias_D), rate_DN, b_BTN, c_BTN, state_BDN)
        return y_BTD if skip_D is None else (y_BTD + skip_D * x_BTD).to(y_BTD.dtype), final_BDN
    if kernels:
        sides = (side if side is None else side[None] for side in (dt_bias_D, skip_D))
        scanned = (x_BTD, dt_BTD, rate_DN[None], b_BTN, c_BTN, state_BDN)
        y_BTD, final_BDN, *_ = selective_scan_operator(*scanned, *sides, None, False)
        return y_BTD, None if state_BDN is None else final_BDN.to(state_BDN.dtype)
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    start_BDN = x_BTD.new_zeros(x_BTD.shape[0], *rate_DN.shape) if state_BDN is None else state_BDN
    with torch.autocast(x_BTD.device.type, enabled=False):
        tensors = (t.to(wide) for t in (x_BTD, dt_BTD, rate_DN, b_BTN, c_BTN, start_BDN))
        y_BTD, final_BDN = (_by_tokens if form == "reference" else _SelectiveScan.apply)(*tensors)
    return y_BTD.to(x_BTD.dtype), None if state_BDN is None else final_BDN.to(state_BDN.dtype)


def _check_scan(
    x_BTD: Tensor,
    rate_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    state_BDN: Tensor | None,
    more: dict[str, tuple[Tensor | None, torch.Size]],
) -> None:
    check_axes("rate", rate_DN, "D N")
    batch, length, width = x_BTD.shape
    n_states = rate_DN.shape[1]
    read = (batch, length, n_states)
    expected = more | {"rate": (rate_DN, (width, n_states)), "b": (b_BTN, read), "c": (c_BTN, read)}
    check_arguments(x_BTD, expected | {"state": (state_BDN, (batch, width, n_states))})


def gated_selective_scan(
    x_BTD: Tensor,
    raw_dt_BTD: Tensor,
    rate_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    state_BDN: Tensor | None = None,
    *,
    dt_bias_D: Tensor,
    skip_D: Tensor,
    gate_BTD: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """What lies between the projections of Mamba's block: (S6(x, softplus(raw dt + bias)) + skip x) silu(gate).

    The Triton form makes time steps, outputs and gate where the scan has them in registers. A compiler is given them apart from the
    scan instead: it joins them with their neighbours, and the gradient of the scan alone, which has more registers, takes half the
    time (docs/kernels_small.md).

    Args:
        x_BTD: input.
        raw_dt_BTD: time steps before their bias and softplus.
        rate_DN: decay rates, >= 0.
        b_BTN: write vectors.
        c_BTN: read vectors.
        state_BDN: as for `selective_scan`.
        dt_bias_D: bias of the time steps.
        skip_D: the input's share in the output.
        gate_BTD: gate before its SiLU.

    Returns:
        As `selective_scan`.

    Raises:
        ValueError: shapes do not match, or the sequence is empty.
    """
    _refuse_empty(x_BTD)
    check_axes("x", x_BTD, "B T D")
    width = x_BTD.shape[2:]
    around = {"dt_bias": (dt_bias_D, width), "skip": (skip_D, width), "gate": (gate_BTD, x_BTD.shape)}
    _check_scan(x_BTD, rate_DN, b_BTN, c_BTN, state_BDN, {"raw_dt": (raw_dt_BTD, x_BTD.shape)} | around)
    if not torch.compiler.is_compiling() and pick("selective_scan", x_BTD) == "triton":
        tensors = (x_BTD, raw_dt_BTD, rate_DN[None], b_BTN, c_BTN, state_BDN)
        y_BTD, final_BDN, *_ = selective_scan_operator(*tensors, dt_bias_D[None], skip_D[None], gate_BTD, False)
        return y_BTD, None if state_BDN is None else final_BDN.to(state_BDN.dtype)
    sides = {"dt_bias_D": dt_bias_D, "skip_D": skip_D}
    y_BTD, final_BDN = selective_scan(x_BTD, raw_dt_BTD, rate_DN, b_BTN, c_BTN, state_BDN, **sides)
    if torch.compiler.is_compiling() and threads_own_channels(x_BTD, b_BTN, gated=False):
        return gated_norm(y_BTD, gate_BTD), final_BDN
    return y_BTD * F.silu(gate_BTD).to(y_BTD.dtype), final_BDN


def time_steps(raw: Tensor, bias_D: Tensor) -> Tensor:
    """softplus(raw + bias), at least in fp32."""
    return F.softplus(raw.to(torch.promote_types(raw.dtype, torch.float32)) + bias_D)


def skip_and_gate(y: Tensor, x: Tensor, skip_D: Tensor, gate: Tensor) -> Tensor:
    """(y + skip x) silu(gate) in the dtype of x."""
    return (y + skip_D * x).to(x.dtype) * F.silu(gate).to(x.dtype)


def _by_tokens(x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `selective_scan`: output and final state."""
    h_BTDN = scan_reference(_decay(dt, rate), (dt * x)[..., None] * b[..., None, :], start)
    return (h_BTDN @ c[..., None])[..., 0], h_BTDN[:, -1]


class _SelectiveScan(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        outputs, finals = [], []
        for x_, dt_, b_, c_, start_ in _slices(rate, x, dt, b, c, start):
            h = _states(_decay(dt_, rate), dt_ * x_, b_, start_)
            outputs.append((h @ c_[..., None])[..., 0])
            finals.append(h[:, -1])
        return torch.cat(outputs), torch.cat(finals)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
        x, dt, rate, b, c, start = ctx.saved_tensors
        parts = [_slice_gradients(rate, *part) for part in _slices(rate, x, dt, b, c, start, dy, dfinal)]
        dx, ddt, drate, db, dc, dstart = zip(*parts, strict=True)
        return torch.cat(dx), torch.cat(ddt), torch.stack(drate).sum(0), torch.cat(db), torch.cat(dc), torch.cat(dstart)


def _slice_gradients(
    rate: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, start: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, rate, b, c and start for some of the sequences.

    The gradient g_t of h_t obeys the same recurrence backward in time, g_t = dy_t c_t^T + a_{t+1} g_{t+1}.
    """
    a, u = _decay(dt, rate), dt * x
    h = _states(a, u, b, start)
    dh = dy[..., None] * c[..., None, :]
    later = torch.cat((a[:, 1:], torch.ones_like(a[:, :1])), dim=1)
    g = _states_from(later.flip(1), dh.flip(1), dfinal).flip(1)
    du = (g @ b[..., None])[..., 0]
    dlog = g * a * torch.cat((start[:, None], h[:, :-1]), dim=1)
    ddt = -(dlog * rate).sum(-1) + du * x
    drate = -(dlog * dt[..., None]).sum((0, 1))
    db = (u[..., None, :] @ g)[..., 0, :]
    dc = (dy[..., None, :] @ h)[..., 0, :]
    return du * dt, ddt, drate, db, dc, a[:, 0] * g[:, 0]


def _decay(dt_BTD: Tensor, rate_DN: Tensor) -> Tensor:
    return (-dt_BTD[..., None] * rate_DN).exp()


def _states(a_BTDN: Tensor, u_BTD: Tensor, b_BTN: Tensor, start_BDN: Tensor) -> Tensor:
    return _states_from(a_BTDN, u_BTD[..., None] * b_BTN[..., None, :], start_BDN)


def _slices(rate_DN: Tensor, x_BTD: Tensor, *others: Tensor) -> zip:
    """Cuts the batch so that one [B, T, D, N] slice fits a cache (CPU) or a part of the memory (GPU)."""
    limit = 1 << 18 if x_BTD.device.type == "cpu" else 1 << 27
    rows = max(1, limit // (x_BTD.shape[1] * rate_DN.numel()))
    return zip(*(t.split(rows) for t in (x_BTD, *others)), strict=True)
