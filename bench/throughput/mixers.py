"""Whole mixers as problems: a mixer, or the layers of a pattern one after the other, with projections and norms.

The definition is the mixer's own `step`, token by token in double precision.

Shape legend: B batch, T length, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.model import build_mixer
from bench.spec import LayerSpec
from bench.throughput import bounds
from bench.throughput.bounds import Cost
from bench.throughput.problem import SINGLE, SIXTEEN, Problem, Tensors, precision_of
from kernels.step import states_in_place
from mixers import Mixer

States = list[dict[str, Tensor]]

TOLERANCES = {SINGLE: {"output": 1e-3, "gradient": 2e-3}, SIXTEEN: {"output": 3e-2, "gradient": 5e-2}}
"""A mixer rounds after each of its maps, so that its error is several roundings long."""


class Stack(nn.Module):
    """Mixers one after the other.

    Args:
        layers: their specs.
        d_model: D.
        max_len: longest sequence.
    """

    def __init__(self, layers: Sequence[LayerSpec], d_model: int, max_len: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.mixers: Sequence[Mixer] = nn.ModuleList(build_mixer(spec, d_model, i, max_len) for i, spec in enumerate(layers))  # type: ignore[assignment]

    def forward(self, x_BTD: Tensor, states: States | None = None) -> tuple[Tensor, States | None]:
        """A segment, and the states after it if some were given."""
        after: States = []
        for index, mixer in enumerate(self.mixers):
            x_BTD, state = mixer(x_BTD, None if states is None else states[index])
            after += [] if state is None else [state]
        return x_BTD, None if states is None else after

    def steps(self, x_BTD: Tensor, states: States) -> Tensor:
        """The definition: every token by `Mixer.step`."""
        outputs = []
        for token_BD in x_BTD.unbind(1):
            y_BD, after = token_BD, []
            for mixer, state in zip(self.mixers, states, strict=True):
                y_BD, new = mixer.step(y_BD, state)
                after.append(new)
            states = after
            outputs.append(y_BD)
        return torch.stack(outputs, 1)

    def init_states(self, batch: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> States:
        """Of every mixer: growing caches in `dtype`, states of constant size in fp32 or better."""
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = (dtype if _grows(mixer) else wide for mixer in self.mixers)
        return [mixer.init_state(batch, max_len, device=device, dtype=d) for mixer, d in zip(self.mixers, dtypes, strict=True)]

    def counts(self, length: int, dtype: torch.dtype) -> dict[str, int]:
        """What the bound needs to know: weights, weights of linear maps, elements and bytes of the states after `length`."""
        linear = (m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        item, states = dtype.itemsize, [mixer.state_elements(length) for mixer in self.mixers]
        return {
            "weights": sum(p.numel() for p in self.parameters()),
            "linear": sum(linear),
            "state_bytes": sum(n * (item if _grows(m) else 4) for n, m in zip(states, self.mixers, strict=True)),
            "read_bytes": sum(m.read_elements(length) * (item if _grows(m) else 2 * 4) for m in self.mixers),
        }


class _Steps(nn.Module):
    """The definition of a stack as a module, so that weights can be handed in."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x_BTD: Tensor, states: States) -> Tensor:
        return self.stack.steps(x_BTD, states)


def _by_steps(stack: Stack, own: Tensors, states: States | None) -> Tensor:
    """Every token by the recurrence, in the precision of the inputs; weights among the inputs are used."""
    x_BTD = own["x"]
    exact = copy.deepcopy(stack).to(x_BTD.dtype)
    if states is None:
        states = exact.init_states(len(x_BTD), x_BTD.shape[1], device=x_BTD.device, dtype=x_BTD.dtype)
    weights = {f"stack.{name}": own.get(name, p.detach()) for name, p in exact.named_parameters()}
    return functional_call(_Steps(exact), weights, (x_BTD, states))


def _grows(mixer: Mixer) -> bool:
    return mixer.state_elements(64) != mixer.state_elements(128)


def cost(stack: Stack, mode: str, batch: int, length: int, dtype: torch.dtype) -> Cost:
    """The bound of a stack; a state of constant size is read and written by a decoded token, a growing cache read."""
    counts = stack.counts(length, dtype)
    found = bounds.mixer(
        mode,
        batch=batch,
        length=length,
        ends=2 * len(stack.mixers) * stack.d_model * dtype.itemsize,
        weights=counts["weights"] * dtype.itemsize,
        linear=counts["linear"],
    )
    kept = {"prefill": counts["state_bytes"], "decode": counts["read_bytes"]}.get(mode, 0)
    return found + Cost(batch * kept, 0)


def problem(stack: Stack, mode: str, batch: int, length: int, *, generator: torch.Generator, filled: int | None = None) -> Problem:
    """A stack in one of the modes.

    Args:
        stack: on its device, in the dtype that is timed.
        mode: forward, train, prefill or decode.
        batch: B.
        length: T; for decode the tokens already seen.
        generator: of the random inputs.
        filled: for decode, how many of them are really read; the caches have room for all.
    """
    weight = next(stack.parameters())
    device, dtype = weight.device, weight.dtype
    tokens = 1 if mode == "decode" else length
    inputs = {"x": torch.randn(batch, tokens, stack.d_model, device=device, generator=generator).to(dtype)}
    names: list[list[str]] = []
    if mode in ("prefill", "decode"):
        states = stack.init_states(batch, length + 1, device=device, dtype=dtype)
        if mode == "decode":
            before = torch.randn(batch, filled or length, stack.d_model, device=device, generator=generator).to(dtype)
            with torch.no_grad():
                states = stack(before, states)[1] or []
        names = [list(state) for state in states]
        inputs |= {f"{i}.{name}": x.contiguous() for i, state in enumerate(states) for name, x in state.items()}
    parameters = dict(stack.named_parameters())
    if mode == "train":
        inputs |= parameters

    def states_of(own: Tensors) -> States | None:
        return [{name: own[f"{i}.{name}"] for name in group} for i, group in enumerate(names)] if names else None

    def call(own: Tensors) -> Tensors:
        return {"y": stack(own["x"], states_of(own))[0]}

    def step(own: Tensors) -> Tensors:
        with states_in_place():
            return call(own)

    def definition(own: Tensors) -> Tensors:
        return {"y": _by_steps(stack, own, states_of(own))}

    learned = ("x", *parameters) if mode == "train" else ()
    return Problem(
        inputs,
        step if mode == "decode" else call,
        definition,
        learned,
        TOLERANCES[precision_of(dtype)],
        robust=True,
        in_place=mode == "decode",
    )
