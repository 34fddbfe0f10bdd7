"""What the contract's checks share: the mixer under test, its random inputs, and how a check reports.

Shape legend: B batch, T time, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from mixers._base import Mixer, State

Factory = Callable[..., Mixer]
"""Builds the mixer under test. If it also takes the keyword `pattern`, as `functools.partial(SomeMixer, 16, **options)`
does, the declared patterns are proven with the same options, else with the class's default options."""

LONGEST = 70
"""Longest sequence that any check runs: every mixer under test must be defined for it."""

TOLERANCE = 1e-9
"""Largest error between two forms of the same computation in fp64, relative to the largest output or 1."""


class Fault(Exception):
    """A check's finding that the mixer breaks the contract; the message holds the numbers."""


class Case:
    """One mixer under test, in fp64 on the CPU.

    Args:
        factory: builds it.
        seed: of its parameters and of all inputs.
    """

    def __init__(self, factory: Factory, seed: int = 0) -> None:
        self.factory, self.seed = factory, seed

    @cached_property
    def mixer(self) -> Mixer:
        """The mixer, built once; checks must leave it as it was."""
        return self.build()

    @cached_property
    def takes_pattern(self) -> bool:
        """Whether the factory can build another pattern with the same options."""
        parameters = inspect.signature(self.factory).parameters.values()
        return any(p.name == "pattern" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    @property
    def patterns(self) -> frozenset[str]:
        """The declared patterns: those of the instance, whose options may narrow the class's."""
        return (self.mixer if self.takes_pattern else type(self.mixer)).caps.patterns

    def build(self, *, member: int = 0, dtype: torch.dtype = torch.float64, pattern: str | None = None) -> Mixer:
        """A fresh mixer whose parameters are nudged off zeros and ones, since those hide faults behind them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + member)
            if pattern is None:
                mixer = self.factory()
            elif self.takes_pattern:
                mixer = self.factory(pattern=pattern)
            else:
                mixer = type(self.mixer)(self.mixer.d_model, pattern=pattern)
            mixer = mixer.to(torch.float64)
            with torch.no_grad():
                for parameter in mixer.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return mixer.to(dtype)

    def inputs(self, batch: int, length: int, *, stream: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal input [B, T, D], the same for the same arguments; a longer one extends a shorter one."""
        generator = torch.Generator().manual_seed(1000 + self.seed + stream)
        x_TBD = torch.randn(length, batch, self.mixer.d_model, generator=generator, dtype=torch.float64)
        return x_TBD.transpose(0, 1).contiguous().to(dtype)


def forward(mixer: Mixer, x_BTD: Tensor) -> Tensor:
    """The stateless output."""
    y_BTD, state = mixer(x_BTD)
    if state is not None:
        raise Fault("forward without a state returned one; state=None asks for the output alone")
    return y_BTD


def run_steps(mixer: Mixer, x_BTD: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """The output of the token-by-token loop, and the state after it."""
    if state is None:
        state = mixer.init_state(x_BTD.shape[0], LONGEST, dtype=x_BTD.dtype)
    outputs = []
    for x_BD in x_BTD.unbind(1):
        y_BD, state = mixer.step(x_BD, state)
        outputs.append(y_BD)
    return torch.stack(outputs, 1), state


def run_segments(mixer: Mixer, x_BTD: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """The output of `forward` over consecutive segments that end at `cuts` and at the end."""
    state = mixer.init_state(x_BTD.shape[0], LONGEST, dtype=x_BTD.dtype)
    outputs = []
    for segment in x_BTD.tensor_split(cuts, dim=1):
        y_BTD, state = mixer(segment, state)
        if state is None:
            raise Fault("forward with a state returned none")
        outputs.append(y_BTD)
    return torch.cat(outputs, 1)


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected entry, or to 1 if that is smaller; NaN counts as infinite."""
    if got.shape != expected.shape:
        raise Fault(f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if got.numel() == 0:
        return 0.0
    got, expected = got.detach(), expected.detach()
    scale = max(float(expected.abs().max()), 1.0)
    return float(((got - expected).abs().max() / scale).nan_to_num(nan=float("inf")))


def require_small(worst: float, what: str, tolerance: float = TOLERANCE) -> str:
    """The report "max error ..." or, above the tolerance, a `Fault` that says where."""
    if not worst <= tolerance:
        raise Fault(f"{what}: max error {worst:.1e}, allowed {tolerance:.0e}")
    return f"max error {worst:.1e}"
