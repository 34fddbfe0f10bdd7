"""Which walks the delta rule takes, and their launches: those of `kernels.delta_hopper` where they fit, else plain Triton's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.walk import _triton_dtype, padded

if TYPE_CHECKING:
    from kernels.delta import Kept, Launch

HOPPER = FUSED = True
CHUNK = 64
"""Tokens of a chunk, which are the rows of one product of a warp group."""
ALIGNED = 8
"""16-bit elements in the 16 bytes on which the tensor memory accelerator wants rows to start."""


def fit(k_dim: int, *rows: Tensor) -> bool:
    """Whether the Hopper walks take these rows of queries, keys and values (or gradients of outputs)."""
    first = rows[0]
    if not first.is_cuda or torch.cuda.get_device_capability(first.device)[0] != 9:
        return False
    if first.dtype not in (torch.float16, torch.bfloat16) or any(x.dtype != first.dtype for x in rows):
        return False
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(s > 0 and s % ALIGNED == 0 for s in x.stride()[:3]) for x in rows
    )
    return aligned and k_dim <= 128 and k_dim % ALIGNED == 0 and rows[-1].shape[3] % ALIGNED == 0


def _described(x: Tensor, block: list[int]) -> Any:
    """What the tensor memory accelerator has to know of a tensor that it moves in blocks."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from kernels.delta_hopper import shared_layout

    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, shared_layout(block[-1], len(block)))


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, kept: Kept, first: Tensor | None, o: Tensor, last: Tensor, launch: Launch,
    *, gated: bool, return_state: bool, keep: bool,
) -> None:  # fmt: skip
    """The forward walk on Hopper; writes o, last, and what is kept."""
    from kernels import delta_hopper

    batch, length, heads, v_dim = v.shape
    k_dim = k.shape[3]
    wide, tile = max(padded(k_dim), CHUNK), min(launch.tile, max(32, padded(v_dim)))
    of_keys, of_values = [1, CHUNK, 1, wide], [1, CHUNK, 1, tile]
    out = _described(o, of_values)
    errors, states = out, out
    if keep:
        errors, states = _described(kept.errors, of_values), _described(kept.states.flatten(0, 2), [1, wide, tile])
    delta_hopper.forward_kernel[(batch * heads * -(-v_dim // tile),)](
        _described(q, of_keys), _described(k, of_keys), _described(v, of_values),
        _described(kept.couplings.flatten(0, 2), [1, CHUNK, CHUNK]), out, errors, states,
        beta, kept.decays, v if first is None else first, last, length, heads, heads // k.shape[2],
        K=k_dim, V=v_dim, BK=wide, BV=tile, C=CHUNK, GATED=gated, FIRST=first is not None, LAST=return_state, KEEP=keep,
        DOT=_triton_dtype(v.dtype), num_warps=launch.warps,
    )  # fmt: skip


def reverse(
    q: Tensor, k: Tensor, do: Tensor, beta: Tensor, kept: Kept, dlast: Tensor | None, solved: Tensor, dfirst: Tensor,
    dstates: Tensor, launch: Launch, *, gated: bool, first: bool,
) -> None:  # fmt: skip
    """The reverse walk on Hopper; writes solved, dfirst and dstates."""
    from kernels import delta_hopper

    batch, length, heads, v_dim = do.shape
    k_dim = k.shape[3]
    wide, tile = max(padded(k_dim), CHUNK), min(launch.tile, max(32, padded(v_dim)))
    of_keys, of_values = [1, CHUNK, 1, wide], [1, CHUNK, 1, tile]
    delta_hopper.reverse_kernel[(batch * heads * -(-v_dim // tile),)](
        _described(q, of_keys), _described(k, of_keys), _described(do, of_values),
        _described(kept.couplings.flatten(0, 2), [1, CHUNK, CHUNK]), _described(solved, of_values),
        _described(dstates.flatten(0, 2), [1, wide, tile]),
        beta, kept.decays, do if dlast is None else dlast, dfirst, length, heads, heads // k.shape[2],
        K=k_dim, V=v_dim, BK=wide, BV=tile, C=CHUNK, GATED=gated, FIRST=first, DLAST=dlast is not None,
        DOT=_triton_dtype(do.dtype), num_warps=launch.warps,
    )  # fmt: skip


def backward(
    q: Tensor, k: Tensor, do: Tensor, beta: Tensor, kept: Kept, dlast: Tensor | None, grads: tuple[Tensor, ...], dfirst: Tensor,
    warps: int, *, gated: bool, gate_grad: bool, first: bool,
) -> None:  # fmt: skip
    """All gradients on Hopper in one walk; writes those of q, k, v, beta and the log decays, which `grads` holds, and dfirst."""
    from kernels import delta_hopper_backward

    batch, length, heads, v_dim = do.shape
    k_dim = k.shape[3]
    width = max(padded(k_dim), padded(v_dim), CHUNK)
    of_rows = [1, CHUNK, 1, width]
    dq, dk, dv, dbeta, dgate = grads
    delta_hopper_backward.backward_kernel[(batch * heads,)](
        *(_described(x, of_rows) for x in (q, k, do, kept.errors)), _described(kept.states.flatten(0, 2), [1, width, width]),
        _described(kept.couplings.flatten(0, 2), [1, CHUNK, CHUNK]), *(_described(x, of_rows) for x in (dq, dk, dv)),
        beta, kept.decays, do if dlast is None else dlast, dbeta, dgate, dfirst, length, heads, heads // k.shape[2],
        K=k_dim, V=v_dim, D=width, C=CHUNK, GATED=gated, GATE_GRAD=gate_grad, FIRST=first, DLAST=dlast is not None,
        DOT=_triton_dtype(do.dtype), num_warps=warps,
    )  # fmt: skip
