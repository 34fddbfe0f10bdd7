"""Linear maps into and out of tensors that lie channel by channel, [channels, tokens].

A matrix product makes either layout at no cost, but torch's own gradients would come out turned: each here has the layout of what
it is the gradient of.

Shape legend: G members, N tokens, D channels of tokens, E of the channelwise tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._members import fold_members


def to_channels(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """W x^T of each token, channel by channel: [E, N]; in autocast's dtype where that is on."""
    x, weight = _autocast(x_ND, weight_ED)
    return _to_channels(x[None], weight[None]).squeeze(0)


def from_channels(y_EN: Tensor, weight_DE: Tensor) -> Tensor:
    """W y of each token, token by token: [N, D]; in autocast's dtype where that is on."""
    y, weight = _autocast(y_EN, weight_DE)
    return _from_channels(y[None], weight[None]).squeeze(0)


# Operators that a compiler sees through, forward and backward.
@torch.library.triton_op("mixer_bench::to_channels", mutates_args={})
def _to_channels(x_GND: Tensor, weight_GED: Tensor) -> Tensor:
    return _product(weight_GED, x_GND.mT)


@torch.library.triton_op("mixer_bench::from_channels", mutates_args={})
def _from_channels(y_GEN: Tensor, weight_GDE: Tensor) -> Tensor:
    return _product(y_GEN.mT, weight_GDE.mT)


def _save(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_to(ctx, dz_GEN: Tensor) -> tuple[Tensor, Tensor]:
    x_GND, weight_GED = ctx.saved_tensors
    return _product(dz_GEN.mT, weight_GED), _product(dz_GEN, x_GND)


def _differentiate_from(ctx, dout_GND: Tensor) -> tuple[Tensor, Tensor]:
    y_GEN, weight_GDE = ctx.saved_tensors
    return _product(weight_GDE.mT, dout_GND.mT), _product(dout_GND.mT, y_GEN.mT)


_to_channels.register_autograd(_differentiate_to, setup_context=_save)
_from_channels.register_autograd(_differentiate_from, setup_context=_save)


@_to_channels.register_vmap
def _(info, in_dims: tuple[int | None, int | None], x_GND: Tensor, weight_GED: Tensor) -> tuple[Tensor, int]:
    x, weight = (fold_members(t, axis, info.batch_size) for t, axis in zip((x_GND, weight_GED), in_dims, strict=True))
    return _to_channels(x, weight).unflatten(0, (info.batch_size, -1)), 0


@_from_channels.register_vmap
def _(info, in_dims: tuple[int | None, int | None], y_GEN: Tensor, weight_GDE: Tensor) -> tuple[Tensor, int]:
    y, weight = (fold_members(t, axis, info.batch_size) for t, axis in zip((y_GEN, weight_GDE), in_dims, strict=True))
    return _from_channels(y, weight).unflatten(0, (info.batch_size, -1)), 0


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A b of each member; a single one by the product for one matrix, which cuts long sums itself."""
    return torch.mm(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    kind = tensors[0].device.type
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors) if torch.is_autocast_enabled(kind) else tensors
