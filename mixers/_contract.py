"""The contract of the zoo: checks that every mixer must pass, importable by tests, by `bench check` and by notebooks.

Everything runs in fp64 on the CPU with narrow mixers, in a second or two per mixer. A mixer that passes may be trained,
decoded, stacked into fleets and plotted by the state size that it declares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kernels.values import checked_values
from mixers import _checks_form as form
from mixers import _checks_function as function
from mixers._base import Mixer
from mixers._case import Case, Factory, Fault

CHECKS: dict[str, Callable[[Case], str]] = {
    "interface": form.interface,
    "step": function.step_equals_forward,
    "split": function.split_equals_whole,
    "prefill": function.prefill_then_step,
    "causality": function.causality,
    "history": function.history_use,
    "gradients": function.gradients,
    "rows": function.rows_equal_forward,
    "batch": function.batch_independence,
    "padding": function.padding,
    "ragged": function.ragged_lengths,
    "purity": form.state_purity,
    "state": form.state_declared,
    "meta": form.meta_build,
    "vmap": form.vmap_equals_loop,
    "patterns": form.patterns,
    "precision": function.precision,
}
"""The checks by name, in the order in which they are best read."""


@dataclass(frozen=True)
class CheckResult:
    """What one check found.

    Args:
        name: a key of `CHECKS`.
        passed: whether the mixer meets it.
        detail: numbers if it does, the breach or the error's message if not.
    """

    name: str
    passed: bool
    detail: str


def check_contract(factory: Factory, *, names: Iterable[str] | None = None, seed: int = 0) -> list[CheckResult]:
    """Runs the checks on one mixer with one set of options; kernels look at the values that the mixer hands them.

    Args:
        factory: builds the mixer at a small width, e.g. `functools.partial(GLA, 16, n_heads=2)`; see `Factory`.
        names: the checks to run, all by default.
        seed: of parameters and inputs.

    Returns:
        One result per check; an exception inside a check is a failed result that holds its message.

    Raises:
        ValueError: a name is not that of a check.
    """
    names = list(CHECKS if names is None else names)
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise ValueError(f"no contract check is called {', '.join(unknown)}; they are {', '.join(CHECKS)}")
    case = Case(factory, seed)
    with checked_values():
        return [_run(name, case) for name in names]


def _run(name: str, case: Case) -> CheckResult:
    try:
        return CheckResult(name, True, CHECKS[name](case))
    except Fault as fault:
        return CheckResult(name, False, str(fault))
    except Exception as problem:  # a mixer may break in any way, and the report must say how
        return CheckResult(name, False, f"{type(problem).__name__}: {problem}")


def bounded_state(mixer: Mixer) -> bool:
    """Whether the state stops growing, measured at two lengths far beyond any window, or at the longest ones allowed."""
    longest = mixer.caps.max_len or 1 << 21
    return mixer.state_elements(longest) == mixer.state_elements(longest // 2)
