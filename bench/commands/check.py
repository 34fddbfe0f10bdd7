"""`bench check`: the contract of a mixer, in about a minute on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from bench import catalog
from bench.commands.console import Output
from bench.grammar import STEM, parse_layers
from bench.spec import LayerSpec

if TYPE_CHECKING:
    from mixers._contract import CheckResult

CHECK_D_MODEL = 16
CHECK_MAX_LEN = 128


def run_checks(layer: LayerSpec) -> list[CheckResult]:
    """Runs the contract on one mixer with the given options.

    Raises:
        UserError: the name is not a Mixer subclass, or the mixer refuses its options.
    """
    from bench.model import build_mixer
    from mixers._contract import check_contract

    build_mixer(layer, CHECK_D_MODEL, 0, CHECK_MAX_LEN)  # a wrong option is the caller's error, not a broken contract
    return check_contract(lambda: build_mixer(layer, CHECK_D_MODEL, 0, CHECK_MAX_LEN))


def layers_to_check(expression: str) -> list[LayerSpec]:
    """The mixers of an expression; a bare zoo mixer is checked in each of its variants."""
    layers = {layer.label(): layer for layer in parse_layers(expression)}
    chosen = [layer for layer in layers.values() if layer != STEM or expression.startswith("base_conv")]
    if len(chosen) == 1 and not chosen[0].options:
        variants = getattr(catalog.load("mixer", chosen[0].mixer), "variants", ({},))
        return [LayerSpec(mixer=chosen[0].mixer, options=dict(options)) for options in variants]
    return chosen


def run(expression: str, output: Output) -> int:
    """Checks a mixer and prints pass or fail.

    Returns:
        The exit code: 0 if everything passed, 1 if not.
    """
    failures = 0
    for layer in layers_to_check(expression):
        results = run_checks(layer)
        table = Table(title=layer.label())
        for column in ("check", "result", "measured"):
            table.add_column(column, overflow="fold")
        for result in results:
            table.add_row(result.name, "pass" if result.passed else "FAIL", result.detail)
            content = {"mixer": layer.label(), "check": result.name, "passed": result.passed, "detail": result.detail}
            output.emit("check", content)
        output.console.print(table)
        failures += sum(not result.passed for result in results)
    output.say("Every check passed." if not failures else f"{failures} check(s) failed.")
    return 1 if failures else 0
