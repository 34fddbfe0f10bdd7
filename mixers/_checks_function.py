"""Contract checks of the function that a mixer computes: its forms agree, and it depends on what it should.

Each check takes a `Case`, returns a short report with numbers, and raises on a breach. Shapes: B batch, T time, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixers._base import Mixer
from mixers._case import LONGEST, Case, Fault, error, forward, require_small, run_segments, run_steps

CAUSAL_LEAK = 1e-12
"""Allowed effect of the future, relative to the size of the disturbed outputs: the rounding of an FFT, no more."""


def step_equals_forward(case: Case) -> str:
    """The token loop equals `forward` at lengths around chunk boundaries."""
    x = case.inputs(2, LONGEST)
    with torch.no_grad():
        stepped, _ = run_steps(case.mixer, x)
        errors = {n: error(forward(case.mixer, x[:, :n]), stepped[:, :n]) for n in (1, 2, 7, 33, LONGEST)}
    worst = max(errors, key=lambda n: errors[n])
    return require_small(errors[worst], f"step loop against forward at T={worst}")


def split_equals_whole(case: Case) -> str:
    """Consecutive segments that pass the state on equal one call."""
    worst, where = 0.0, ""
    with torch.no_grad():
        for length, cuts in ((12, (1,)), (12, (5,)), (12, (11,)), (12, (1, 5, 11)), (70, (1,)), (70, (17, 64)), (70, (64,))):
            x = case.inputs(2, length)
            found = error(run_segments(case.mixer, x, cuts), forward(case.mixer, x))
            if not found <= worst:
                worst, where = found, f"T={length} cut at {cuts} against one call"
    return require_small(worst, where)


def prefill_then_step(case: Case) -> str:
    """Steps continue from the state that `forward` leaves."""
    x = case.inputs(2, 41)
    worst = 0.0
    with torch.no_grad():
        whole = forward(case.mixer, x)
        for n in (1, 16, 33):
            _, state = case.mixer(x[:, :n], case.mixer.init_state(2, LONGEST, dtype=x.dtype))
            stepped, _ = run_steps(case.mixer, x[:, n:], state)
            worst = max(worst, error(stepped, whole[:, n:]))
    return require_small(worst, "steps after a prefill against forward")


def causality(case: Case) -> str:
    """Whatever the future holds, the past stays the same, with and without a state."""
    length = 33
    x = case.inputs(2, length)
    disturbance = 10 * case.inputs(2, length, stream=1)
    worst, where = 0.0, ""
    with torch.no_grad():
        for stateful in (False, True):

            def outputs(x_BTD: Tensor, stateful: bool = stateful) -> Tensor:
                return run_segments(case.mixer, x_BTD, ()) if stateful else forward(case.mixer, x_BTD)

            before = outputs(x)
            for n in (1, 16, 32):
                after = outputs(torch.cat((x[:, :n], x[:, n:] + disturbance[:, n:]), 1))
                leak = float((after - before)[:, :n].abs().max() / after.abs().max().clamp(min=1))
                if not leak <= worst:
                    worst, where = leak, f"changing tokens {n}.. changed outputs before {n}"
    return require_small(worst, where, CAUSAL_LEAK).replace("error", "leak")


def history_use(case: Case) -> str:
    """Some earlier token has an effect on the last output: a mixer that ignores the past mixes nothing."""
    x = case.inputs(2, 12).requires_grad_()
    y = forward(case.mixer, x)
    (gradient,) = torch.autograd.grad(y[:, -1].square().sum(), x, allow_unused=True)
    effect_T = torch.zeros(12) if gradient is None else gradient.abs().amax((0, 2))
    seen = int((effect_T[:-1] > 1e-10).sum())
    if not seen:
        raise Fault("the last of 12 outputs depends on no earlier input")
    return f"the last of 12 outputs depends on {seen} of 11 earlier inputs"


def gradients(case: Case) -> str:
    """Gradients of `forward` are finite, equal those of the token loop, and equal finite differences."""
    mixer, x = case.build(), case.inputs(2, 19)
    weight = case.inputs(2, 19, stream=2)
    leaves = [x.requires_grad_(), *mixer.parameters()]

    def of(y_BTD: Tensor) -> list[Tensor]:
        found = torch.autograd.grad((y_BTD * weight).sum(), leaves, allow_unused=True)
        return [torch.zeros_like(a) if g is None else g for a, g in zip(leaves, found, strict=True)]

    got, expected = of(forward(mixer, x)), of(run_steps(mixer, x)[0])
    names = ["input", *(name for name, _ in mixer.named_parameters())]
    for name, gradient in zip(names, got, strict=True):
        if not bool(gradient.isfinite().all()):
            raise Fault(f"the gradient of {name} is not finite")
    errors = {name: error(g, e) for name, g, e in zip(names, got, expected, strict=True)}
    worst = max(errors, key=lambda name: errors[name])
    report = require_small(errors[worst], f"gradient of {worst}, forward against step loop", 1e-8)
    slope_error = _finite_difference(mixer, leaves, got, weight)
    require_small(slope_error, "gradient against finite differences", 1e-5)
    return f"{report} to the step loop, {slope_error:.1e} to finite differences"


def rows_equal_forward(case: Case) -> str:
    """`at_rows` is `forward` at the rows, with its gradients, for few rows and for all of them in any order."""
    mixer, x = case.build(), case.inputs(2, 24).requires_grad_()
    leaves = [x, *mixer.parameters()]
    worst, where = 0.0, ""
    for count in (1, 5, 24):
        order = case.inputs(2, 24, stream=3)[..., 0].argsort(1)[:, :count]
        index = order[..., None].expand(-1, -1, mixer.d_model)
        weight = case.inputs(2, count, stream=2)
        outputs = (mixer.at_rows(x, order, x.gather(1, index)), forward(mixer, x).gather(1, index))
        pairs = [("output", *outputs)]
        found = [torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True) for y in outputs]
        names = ["input", *(name for name, _ in mixer.named_parameters())]
        for name, leaf, got, wanted in zip(names, leaves, *found, strict=True):
            pairs.append((f"gradient of {name}", *(torch.zeros_like(leaf) if g is None else g for g in (got, wanted))))
        for name, got, wanted in pairs:
            if not error(got, wanted) <= worst:
                worst, where = error(got, wanted), f"{name} at {count} of 24 rows against forward"
    return require_small(worst, where, 1e-8)


def _finite_difference(mixer: Mixer, leaves: list[Tensor], got: list[Tensor], weight: Tensor) -> float:
    """Relative error of the slope along one random direction through input and parameters."""
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(a.shape, generator=generator, dtype=a.dtype) for a in leaves]
    width = 1e-6
    losses = []
    with torch.no_grad():
        for shift in (width, -2 * width):
            for leaf, d in zip(leaves, direction, strict=True):
                leaf.add_(shift * d)
            losses.append(float((forward(mixer, leaves[0]) * weight).sum()))
    slope = (losses[0] - losses[1]) / (2 * width)
    expected = sum(float((g * d).sum()) for g, d in zip(got, direction, strict=True))
    return abs(slope - expected) / max(abs(expected), 1.0)


def batch_independence(case: Case) -> str:
    """A sequence comes out the same alone and among others, in `forward` and in `step`."""
    x = case.inputs(3, 33)
    others = torch.cat((100 * case.inputs(3, 33, stream=1)[:2], x[2:]))
    worst = 0.0
    with torch.no_grad():
        alone, stepped = forward(case.mixer, x[2:]), run_steps(case.mixer, x[2:, :7])[0]
        for batch in (x, others):
            worst = max(worst, error(forward(case.mixer, batch)[2:], alone))
            worst = max(worst, error(run_steps(case.mixer, batch[:, :7])[0][2:], stepped))
    return require_small(worst, "the same sequence alone and in a batch")


def padding(case: Case) -> str:
    """Garbage to the right of a sequence does not reach it, at lengths around chunk boundaries."""
    garbage = 10 * case.inputs(2, LONGEST, stream=1)
    worst, where = 0.0, ""
    with torch.no_grad():
        for length, padded in ((1, 2), (5, 12), (16, 17), (33, 64), (63, 70)):
            x = case.inputs(2, length)
            whole = forward(case.mixer, torch.cat((x, garbage[:, length:padded]), 1))
            scale = max(float(whole.abs().max()), 1.0)
            found = float((whole[:, :length] - forward(case.mixer, x)).abs().max()) / scale
            if not found <= worst:
                worst, where = found, f"length {length} padded to {padded}"
    return require_small(worst, where)


def ragged_lengths(case: Case) -> str:
    """States of sequences of different lengths, one of them a single token, continue together as they do alone."""
    x = case.inputs(3, 24)
    with torch.no_grad():
        states = []
        for row, length in enumerate((1, 5, 17)):
            start = case.mixer.init_state(1, LONGEST, dtype=x.dtype)
            states.append(case.mixer(x[row : row + 1, :length], start)[1])
        together = {name: torch.cat([state[name] for state in states]) for name in states[0]}
        rest = [x[row : row + 1, 17:] for row in range(3)]
        stepped = torch.cat([run_steps(case.mixer, x_1TD, s)[0] for x_1TD, s in zip(rest, states, strict=True)])
        segment = torch.cat([case.mixer(x_1TD, s)[0] for x_1TD, s in zip(rest, states, strict=True)])
        worst = error(run_steps(case.mixer, x[:, 17:], together)[0], stepped)
        worst = max(worst, error(case.mixer(x[:, 17:], together)[0], segment))
    return require_small(worst, "sequences of lengths 1, 5, 17 continued together against alone")


def precision(case: Case) -> str:
    """fp32 stays close to fp64, and bf16 stays finite where torch can compute it."""
    x = case.inputs(2, 33)
    with torch.no_grad():
        exact = forward(case.mixer, x)
        single = forward(case.build(dtype=torch.float32), x.float())
        if single.dtype != torch.float32:
            raise Fault(f"fp32 input gave {single.dtype} output")
        report = require_small(error(single.double(), exact), "fp32 against fp64", 1e-3)
        try:
            half = forward(case.build(dtype=torch.bfloat16), x.bfloat16())
        except (RuntimeError, NotImplementedError) as problem:
            if "not implemented for" not in str(problem):
                raise
            return f"{report}; bf16 not implemented on this device"
    if half.dtype != torch.bfloat16:
        raise Fault(f"bf16 input gave {half.dtype} output")
    if not bool(half.isfinite().all()):
        raise Fault("bf16 output is not finite")
    return f"{report}; bf16 error {error(half.double(), exact):.1e}"
