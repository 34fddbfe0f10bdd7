"""A problem: live inputs, the call that is timed, and the definition that it must agree with.

The correctness gate runs the call on a small problem with fresh inputs and compares outputs, and gradients where they are
timed, with the definition in double precision. A call that fails it is never timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.speed_records import GateResult

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensors]

SINGLE, SIXTEEN = "fp32", "16 bit"
TOLERANCES = {SINGLE: {"output": 5e-5, "gradient": 1e-4, "gate": 1e-3}, SIXTEEN: {"output": 5e-3, "gradient": 5e-3, "gate": 2e-2}}
"""Largest relative root mean square error of an output, a gradient, and a gradient of gates, by precision."""
GATES = ("log_decay", "beta")
DELTA_GRADIENT = 8e-3
"""Of the delta rule's q, k and v in 16 bits."""


@dataclass
class Problem:
    """See the module docstring.

    Args:
        inputs: named tensors.
        call: what is timed, from inputs to named outputs.
        definition: the same by definition; runs in the precision of its inputs.
        learned: names of the inputs whose gradients a training step makes.
        tolerances: for errors, by "output", "gradient" or "gate".
        robust: errors are medians over rows, and weights are compared all together, since a rounded score may choose
            another key in some rows.
        in_place: the call writes over some of its inputs.
    """

    inputs: Tensors
    call: Function
    definition: Function
    learned: tuple[str, ...] = ()
    tolerances: dict[str, float] = field(default_factory=dict)
    robust: bool = False
    in_place: bool = False

    def run(self, function: Function, tensors: Tensors, *, gradients: bool) -> Tensors:
        """Outputs of a function of the inputs, and the gradients of a weighted sum of the outputs."""
        if not gradients:
            with torch.no_grad():
                return function(tensors)
        outputs = function(tensors)
        weights = weights_for(outputs)
        learned = [tensors[name] for name in self.learned]
        found = torch.autograd.grad(list(outputs.values()), learned, weights, allow_unused=True)
        named = {f"d{name}": x for name, x in zip(self.learned, found, strict=True) if x is not None}
        if self.robust:
            rest = [x.flatten() for name, x in named.items() if name != "dx"]
            named = {"dx": named["dx"], **({"dweights": torch.cat(rest)} if rest else {})}
        return outputs | named

    def leaves(self, dtype: torch.dtype | None = None) -> Tensors:
        """Copies of the inputs, in another precision if one is given; the learned ones ask for gradients.

        Parameters stay what they are in their own precision, because the module that owns them is called.
        """
        found = {}
        for name, x in self.inputs.items():
            if dtype is None and isinstance(x, torch.nn.Parameter):
                found[name] = x
                continue
            copied = x.detach().clone() if dtype is None or not x.is_floating_point() else x.detach().to(dtype, copy=True)
            found[name] = copied.requires_grad_(name in self.learned)
        return found


def weights_for(outputs: Tensors) -> list[Tensor]:
    """Gradients of outputs, the same in every precision and on every device: hashes of positions, between -1 and 1.

    Something periodic would not do: its sum over tokens nearly vanishes, and relative errors of it mean little.
    """
    found = []
    for x in outputs.values():
        mixed = torch.arange(x.numel(), device=x.device).view(x.shape)
        for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D)):
            mixed = ((mixed ^ mixed >> shift) * factor) & 0x7FFFFFFF
        found.append((mixed.float() * 2**-30 - 1).to(x.dtype))
    return found


def precision_of(dtype: torch.dtype) -> str:
    """Which row of the tolerances a dtype belongs to."""
    return SINGLE if dtype == torch.float32 else SIXTEEN


def check(problem: Problem, *, gradients: bool, against: str, function: Function | None = None) -> GateResult:
    """Compares the call, or another function of the same inputs, with the definition.

    Args:
        problem: a small one.
        gradients: whether to compare gradients as well.
        against: the definition in words.
        function: instead of the problem's call.
    """
    wanted = problem.run(problem.definition, problem.leaves(torch.float64), gradients=gradients)
    got = problem.run(function or problem.call, problem.leaves(), gradients=gradients)
    worst, error, tolerance = "nothing compared", None, 0.0
    for name, want in wanted.items():
        allowed = _tolerance(problem, name)
        found = relative_error(got[name], want, robust=problem.robust) if name in got else float("nan")
        if not found < float("inf"):
            return GateResult(passed=False, against=against, worst=name, error=None, tolerance=allowed)
        if error is None or found / allowed > error / tolerance:
            worst, error, tolerance = name, found, allowed
    return GateResult(
        passed=error is not None and error <= tolerance, against=against, worst=worst, error=error, tolerance=tolerance
    )


def _tolerance(problem: Problem, name: str) -> float:
    is_gradient = name == "dweights" or (name.startswith("d") and name[1:] in problem.learned)
    kind = ("gate" if name[1:] in GATES else "gradient") if is_gradient else "output"
    return problem.tolerances[kind]


def relative_error(got: Tensor, want: Tensor, *, robust: bool = False) -> float:
    """Root mean square of the difference over that of the definition; absolute where the definition is zero."""
    got, want = got.detach().double(), want.detach().double().to(got.device)
    if robust and want.ndim > 1:
        difference, size = ((x.square().mean(-1).sqrt()) for x in (got - want, want))
        typical = size.square().mean().sqrt().clamp_min(1e-12)
        return float((difference / typical).flatten().median()) if torch.isfinite(got).all() else float("nan")
    difference, size = (got - want).square().mean().sqrt(), want.square().mean().sqrt()
    return float(difference / size) if size > 1e-9 else float(difference)
