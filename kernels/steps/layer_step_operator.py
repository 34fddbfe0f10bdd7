"""A layer's decoding step as custom operators, one that returns new states and one that writes over them.

Shape legend: B batch, H heads of v, G heads of q and k, K key, V value width, C channels of a convolution, J taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.step_form import StepForm

States = tuple[Tensor, Tensor | None, Tensor | None]


@torch.library.custom_op("mixer_bench::layer_step_", mutates_args=("state", "tail", "sums"))
def layer_step_in_place(
    q: Tensor, k: Tensor | None, v: Tensor | None, decay: Tensor | None, beta: Tensor | None,
    state: Tensor, tail: Tensor | None, sums: Tensor | None,
    taps: Tensor | None, conv_bias: Tensor | None, decay_bias: Tensor | None, log_rate: Tensor | None, skip: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, gate: Tensor | None, places: list[int],
    silu: bool, unit: bool, scale: float, key_scale: float, decay_kind: str, temperature: float, stepped: bool,
    open_beta: bool, max_beta: float, norm: str, eps: float, output_gate: str,
) -> Tensor:  # fmt: skip
    """`kernels.layer_step.layer_step` on contiguous states that are written over; returns the output."""
    form = StepForm(silu, unit, scale, key_scale, decay_kind, temperature, stepped, open_beta, max_beta, norm, eps, output_gate)
    around = (taps, conv_bias, decay_bias, log_rate, skip, norm_weight, norm_bias, gate)
    return _launch((q, k, v, decay, beta), (state, tail, sums), (state, tail, sums), around, form, places)


@torch.library.custom_op("mixer_bench::layer_step", mutates_args=())
def layer_step_operator(
    q: Tensor, k: Tensor | None, v: Tensor | None, decay: Tensor | None, beta: Tensor | None,
    state: Tensor, tail: Tensor | None, sums: Tensor | None,
    taps: Tensor | None, conv_bias: Tensor | None, decay_bias: Tensor | None, log_rate: Tensor | None, skip: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, gate: Tensor | None, places: list[int],
    silu: bool, unit: bool, scale: float, key_scale: float, decay_kind: str, temperature: float, stepped: bool,
    open_beta: bool, max_beta: float, norm: str, eps: float, output_gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output and new states; those that the layer does not have are empty."""
    form = StepForm(silu, unit, scale, key_scale, decay_kind, temperature, stepped, open_beta, max_beta, norm, eps, output_gate)
    around = (taps, conv_bias, decay_bias, log_rate, skip, norm_weight, norm_bias, gate)
    old = tuple(None if x is None else x.contiguous() for x in (state, tail, sums))
    new = tuple(_like(x, q) for x in (state, tail, sums))
    return _launch((q, k, v, decay, beta), old, new, around, form, places), *new


def _launch(
    inputs: tuple[Tensor | None, ...],
    old: tuple[Tensor | None, ...],
    new: tuple[Tensor | None, ...],
    around: tuple[Tensor | None, ...],
    form: StepForm,
    places: list[int],
) -> Tensor:
    from kernels.steps.step_launch import Around, step

    taps, conv_bias, decay_bias, log_rate, skip, norm_weight, norm_bias, gate = around
    named = Around(taps, conv_bias, old[1], decay_bias, log_rate, old[2], skip, norm_weight, norm_bias, gate)
    q, k, v, decay, beta = inputs
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return step(q, k, v, decay, beta, None, None, old[0], new[0], form, named, tuple(places), new[1], new[2])


def _output_like(q: Tensor, state: Tensor) -> Tensor:
    return q.new_empty(state.shape[0], state.shape[1], state.shape[3])


def _like(x: Tensor | None, sample: Tensor) -> Tensor:
    return sample.new_empty(0) if x is None else x.new_empty(x.shape)


@layer_step_in_place.register_fake
def _(
    q: Tensor, k: Tensor | None, v: Tensor | None, decay: Tensor | None, beta: Tensor | None, state: Tensor, *rest: Any
) -> Tensor:
    return _output_like(q, state)


@layer_step_operator.register_fake
def _(
    q: Tensor, k: Tensor | None, v: Tensor | None, decay: Tensor | None, beta: Tensor | None,
    state: Tensor, tail: Tensor | None, sums: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _output_like(q, state), *(_like(x, q) for x in (state, tail, sums))


@layer_step_operator.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Members have weights of their own, so they take a launch each."""

    def of(member: int) -> tuple[Tensor, ...]:
        picked = (x.select(dim, member) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True))
        return layer_step_operator(*picked)

    each = [of(member) for member in range(info.batch_size)]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0, 0)
