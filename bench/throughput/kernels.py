"""The kernels that are timed: each through the entry point that mixers use, so that a row times what the dispatcher runs.

Shape legend: B batch, T length, H heads of v, G heads of q and k, K key, V value width, D channels, N states, C taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.throughput import bounds
from bench.throughput.attentions import Attention, ChosenBlocks
from bench.throughput.bounds import Cost, Shape
from bench.throughput.draws import Draw, learned_in
from bench.throughput.names import KernelName
from bench.throughput.problem import DELTA_GRADIENT, SIXTEEN, TOLERANCES, Problem, Tensors, precision_of
from kernels.conv import short_conv
from kernels.recurrence import linear_recurrence
from kernels.reference import linear_recurrence_reference, scan_reference
from kernels.scan import scan, selective_scan
from kernels.step import states_in_place
from kernels.taylor import features as taylor_features
from kernels.taylor import n_features, taylor_attention

TAPS = 4
NAMED = {"log_decay": "log_decay", "beta_BTH": "beta", "state_BHKV": "state"}
"""Arguments of a recurrence, and what a problem calls them."""
STRONGEST = 5.0
"""Largest rate of the scalar and the strong vector decays; most are weak, as a fourth power makes them."""


@dataclass(frozen=True)
class Recurrence:
    """A member of the family of linear recurrences.

    Args:
        gate: none, constant, scalar, vector (as public benchmarks draw it: the sigmoid of a normal number) or strong_vector.
        delta: whether a write erases first.
        taylor: q and k are mapped to second-order Taylor features inside of the operation, without the division.
    """

    gate: str = "none"
    delta: bool = False
    taylor: bool = False

    def cost(self, shape: Shape, mode: str, item: int) -> Cost:
        """See `bench.throughput.bounds`."""
        features, gate = n_features(shape.key) if self.taylor else None, self.gate.removeprefix("strong_")
        return bounds.recurrence(shape, mode, gate=gate, delta=self.delta, item=item, features=features)

    def state_bytes(self, shape: Shape, item: int) -> int:
        """Of one sequence, in fp32."""
        width = n_features(shape.key) if self.taylor else shape.key
        return 4 * shape.heads * width * shape.value

    def problem(self, shape: Shape, mode: str, draw: Draw) -> Problem:
        """Inputs as mixers make them: keys of the delta rule have unit length, scalar gates are in fp32."""
        batch, length = shape.batch, 1 if mode == "decode" else shape.length
        q, k = (draw.normal(batch, length, shape.groups, shape.key) for _ in range(2))
        if not self.taylor:  # scales its products itself
            k = F.normalize(k.float(), dim=-1).to(draw.dtype) if self.delta else k * shape.key**-0.5
        inputs = {"q": q, "k": k, "v": draw.normal(batch, length, shape.heads, shape.value)}
        if self.gate != "none":
            inputs["log_decay"] = self._decay(shape, length, draw)
        if self.delta:
            inputs["beta"] = draw.uniform(batch, length, shape.heads)
        if mode in ("prefill", "decode"):
            width = self.state_bytes(shape, 4) // (4 * shape.heads * shape.value)
            state = torch.randn(batch, shape.heads, width, shape.value, device=draw.device, generator=draw.generator)
            inputs["state"] = state if mode == "decode" else torch.zeros_like(state)
        learned = tuple(name for name in inputs if not (name == "log_decay" and self.gate == "constant"))
        tolerances = dict(TOLERANCES[precision_of(draw.dtype)])
        if self.delta and precision_of(draw.dtype) == SIXTEEN:
            tolerances["gradient"] = DELTA_GRADIENT

        def call(own: Tensors) -> Tensors:
            if self.taylor:
                o, sums = taylor_attention(
                    own["q"], own["k"], own["v"], eps=None, state=(own["state"], None) if "state" in own else None
                )
                return _outputs(o, None if sums is None else sums[0])
            named: dict[str, Any] = {name: own.get(ours) for name, ours in NAMED.items()}
            return _outputs(*linear_recurrence(own["q"], own["k"], own["v"], **named))

        def step(own: Tensors) -> Tensors:
            with states_in_place():
                return call(own)

        def definition(own: Tensors) -> Tensors:
            q, k = (taylor_features(own[name]) if self.taylor else own[name] for name in ("q", "k"))
            o, state = linear_recurrence_reference(q, k, own["v"], **{name: own.get(ours) for name, ours in NAMED.items()})
            return _outputs(o, state if "state" in own else None)

        return Problem(
            inputs,
            step if mode == "decode" else call,
            definition,
            learned if mode == "train" else (),
            tolerances,
            in_place=mode == "decode",
        )

    def _decay(self, shape: Shape, length: int, draw: Draw) -> Tensor:
        if self.gate == "constant":
            return torch.log1p(-(2.0 ** (-5.0 - torch.arange(shape.heads, device=draw.device))))
        if self.gate == "scalar":
            return -STRONGEST * draw.uniform(shape.batch, length, shape.heads).pow(4)
        size = (shape.batch, length, shape.heads, shape.key)
        if self.gate == "strong_vector":
            return -STRONGEST * draw.uniform(*size).pow(4).to(draw.dtype)
        return F.logsigmoid(draw.normal(*size))


@dataclass(frozen=True)
class SelectiveScan:
    """Mamba's S6; the heads of a shape are its channels, the key width its states."""

    def cost(self, shape: Shape, mode: str, item: int) -> Cost:
        """See `bench.throughput.bounds`."""
        return bounds.selective_scan(shape, mode, item=item)

    def state_bytes(self, shape: Shape, item: int) -> int:
        """Of one sequence, in fp32."""
        return 4 * shape.heads * shape.key

    def problem(self, shape: Shape, mode: str, draw: Draw) -> Problem:
        """Time steps up to 0.1 and rates from 1 to N, as Mamba starts with."""
        batch, length, width, states = shape.batch, shape.length, shape.heads, shape.key
        rates = torch.arange(1, states + 1, device=draw.device, dtype=torch.float32).expand(width, -1).contiguous()
        inputs = {"x": draw.normal(batch, length, width), "dt": 0.1 * draw.uniform(batch, length, width), "rate": rates}
        inputs |= {"b": draw.normal(batch, length, states), "c": draw.normal(batch, length, states)}

        def call(own: Tensors) -> Tensors:
            return {"y": selective_scan(*own.values())[0]}

        def definition(own: Tensors) -> Tensors:
            x, dt, rate, b, c = own.values()
            h = scan_reference((-dt[..., None] * rate).exp(), (dt * x)[..., None] * b[..., None, :])
            return {"y": (h * c[..., None, :]).sum(-1)}

        tolerances = TOLERANCES[precision_of(draw.dtype)] | {"gradient": 2 * TOLERANCES[precision_of(draw.dtype)]["gradient"]}
        return Problem(inputs, call, definition, learned_in(inputs, mode), tolerances)


@dataclass(frozen=True)
class ElementwiseScan:
    """HGRN's and RG-LRU's recurrence."""

    def cost(self, shape: Shape, mode: str, item: int) -> Cost:
        """See `bench.throughput.bounds`."""
        return bounds.elementwise_scan(shape, mode, item=item)

    def state_bytes(self, shape: Shape, item: int) -> int:
        """Of one sequence."""
        return shape.heads * item

    def problem(self, shape: Shape, mode: str, draw: Draw) -> Problem:
        """Factors between 0 and 1."""
        size = (shape.batch, shape.length, shape.heads)
        inputs = {"a": draw.uniform(*size).to(draw.dtype), "x": draw.normal(*size)}
        return Problem(
            inputs,
            lambda own: {"h": scan(own["a"], own["x"])},
            lambda own: {"h": scan_reference(own["a"], own["x"])},
            learned_in(inputs, mode),
            dict(TOLERANCES[precision_of(draw.dtype)]),
        )


@dataclass(frozen=True)
class ShortConv:
    """The depthwise convolution before q, k and v, with its SiLU."""

    def cost(self, shape: Shape, mode: str, item: int) -> Cost:
        """See `bench.throughput.bounds`."""
        return bounds.short_conv(shape, mode, item=item, taps=TAPS)

    def state_bytes(self, shape: Shape, item: int) -> int:
        """The tail of one sequence."""
        return (TAPS - 1) * shape.heads * item

    def problem(self, shape: Shape, mode: str, draw: Draw) -> Problem:
        """Four taps in fp32."""
        width = shape.heads
        weight = draw.uniform(width, TAPS) - 0.5
        inputs = {"x": draw.normal(shape.batch, shape.length, width), "weight": weight}

        def definition(own: Tensors) -> Tensors:
            padded = F.pad(own["x"], (0, 0, TAPS - 1, 0)).mT
            return {"y": F.silu(F.conv1d(padded, own["weight"][:, None], groups=width).mT)}

        return Problem(
            inputs,
            lambda own: {"y": short_conv(own["x"], own["weight"], silu=True)[0]},
            definition,
            learned_in(inputs, mode),
            dict(TOLERANCES[precision_of(draw.dtype)]),
        )


OPERATIONS: dict[KernelName, Any] = {
    "linear": Recurrence(),
    "constant_decay": Recurrence("constant"),
    "scalar_decay": Recurrence("scalar"),
    "ssd": Recurrence("scalar"),
    "delta": Recurrence(delta=True),
    "gated_delta": Recurrence("scalar", delta=True),
    "gla": Recurrence("vector"),
    "gla_strong": Recurrence("strong_vector"),
    "kda": Recurrence("vector", delta=True),
    "kda_strong": Recurrence("strong_vector", delta=True),
    "taylor": Recurrence(taylor=True),
    "attention": Attention(),
    "window": Attention(window=128),
    "chosen_blocks": ChosenBlocks(block=64, chosen=16),
    "selective_scan": SelectiveScan(),
    "scan": ElementwiseScan(),
    "short_conv": ShortConv(),
}


def _outputs(o: Tensor, state: Tensor | None) -> Tensors:
    return {"o": o} if state is None else {"o": o, "state": state}
