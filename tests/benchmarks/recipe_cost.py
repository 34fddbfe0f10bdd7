"""What the recall-memory plot costs on one GPU, estimated from the steps that `fleet_speed` has timed: minutes by family.

    python -m tests.benchmarks.recipe_cost RECORD.json [MORE.json ...] [--trained STORE]

A later record's times replace an earlier one's. A step is taken apart into tokens and labelled rows: attention's cells of 256
tokens, timed with 16 and 64 pairs, tell what a row costs, the same for all mixers, and each mixer's own cells of 64 and 256
tokens what the rest costs, taken as linear in between. A mixer that was not timed at a width or a size of fleet counts as the
mean share of those that were, in the middle between two widths. One seed is a fleet of four learning rates and a reported run
alone; three seeds are a fleet of twelve and one of three, left out if no such fleet was timed. Training, and its validation at
every epoch as a share of it, the mean of the fleets of that size whose validation was timed (of four, where none was). No
compiling, which overlaps with training where several workers share a GPU. All 32 epochs, or with --trained
those that a store's runs of the model took before they passed 0.99 on validation: of a fleet, its last member.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from bench.recipes.readme_plot import readme_plot
from bench.store import Store

EPOCHS = 32
STEPS = {(64, 4): 391, (128, 8): 79, (256, 16): 79, (256, 32): 79, (256, 64): 79}
"""Steps of an epoch by tokens and pairs."""
USUAL, LRS, SEEDS = 128, 4, 3
STANDS_FOR = {"sliding_window": "attention", "delta_net": "gated_delta_net"}
"""Mixers that were not timed, and whose steps stand for theirs."""


class Fleet(NamedTuple):
    """A fleet that was timed."""

    mixer: str
    width: int
    members: int


class Costs:
    """Seconds of fleets, from the rows of records.

    Args:
        rows: of timed fleets.
        validation: rows of timed validations, of one epoch each.
    """

    def __init__(self, rows: list[dict], validation: list[dict]) -> None:
        cells: dict[Fleet, dict] = defaultdict(dict)
        for row in rows:
            cells[Fleet(row["mixer"], row["width"], row["members"])].update(row["cells"])
        whole = cells[Fleet("attention", USUAL, LRS)]
        self.a_pair = (whole["256x64"]["ms"] - whole["256x16"]["ms"]) / 48 / LRS
        """Milliseconds of a labelled row of each example, for each member."""
        self.training = {
            fleet: EPOCHS * self._epoch(found, fleet.members)
            for fleet, found in cells.items()
            if {"64x4", "256x16"} <= found.keys()
        }
        parts: dict[int, dict[Fleet, float]] = defaultdict(dict)
        for row in validation:
            fleet = Fleet(row["mixer"], row["width"], row["members"])
            if fleet in self.training:
                parts[fleet.members][fleet] = EPOCHS * row["ms"] / 1e3 / self.training[fleet]
        self.validation = {members: mean(found.values()) for members, found in parts.items()}
        """Share of a fleet's training that its validation takes, by members."""
        self.shares = {
            (width, members): found
            for width in sorted({fleet.width for fleet in self.training})
            for members in (1, SEEDS, LRS, LRS * SEEDS)
            if (found := self._shares(width, members))
        }
        """By width and members, the time of a fleet as a share of the usual one's, by mixer."""

    def _epoch(self, cells: dict, members: int) -> float:
        pair = self.a_pair * members
        short, long = cells["64x4"]["ms"] - 4 * pair, cells["256x16"]["ms"] - 16 * pair
        steps = ((short + (long - short) * (tokens - 64) / 192 + pairs * pair, count) for (tokens, pairs), count in STEPS.items())
        return sum(ms * count for ms, count in steps) / 1e3

    def _shares(self, width: int, members: int) -> dict[str, float]:
        timed = {fleet.mixer: seconds for fleet, seconds in self.training.items() if fleet[1:] == (width, members)}
        usual = {mixer: self.training.get(Fleet(mixer, USUAL, LRS)) for mixer in timed}
        return {mixer: timed[mixer] / seconds for mixer, seconds in usual.items() if seconds}

    def mixer_of(self, expression: str) -> str | None:
        """The timed mixer that stands for one of the recipe: itself, another of its family, or its substitute."""
        timed = [fleet.mixer for fleet in self.training if fleet[1:] == (USUAL, LRS)]
        family = _family(expression)
        family = STANDS_FOR.get(family, family)
        return expression if expression in timed else next((mixer for mixer in timed if _family(mixer) == family), None)

    def seconds(self, mixer: str, width: int, members: int) -> float:
        """A fleet of a timed mixer, validation included."""
        known = Fleet(mixer, width, members)
        if known in self.training:
            return self.training[known] * self.validated(members)
        share = self._width_share(mixer, width) * (1.0 if members == LRS else self._own(mixer, USUAL, members))
        return self.training[Fleet(mixer, USUAL, LRS)] * share * self.validated(members)

    def validated(self, members: int) -> float:
        """What training and validation take, as a multiple of training."""
        return 1 + self.validation.get(members, self.validation.get(LRS, 0.0))

    def _width_share(self, mixer: str, width: int) -> float:
        widths = sorted({width for width, members in self.shares if members == LRS})
        if width in widths:
            return self._own(mixer, width, LRS)
        below = max(w for w in (0, *widths) if w < width)
        above = min(w for w in widths if w > width)
        least = self._own(mixer, below, LRS) if below else 0.0
        return least + (self._own(mixer, above, LRS) - least) * (width - below) / (above - below)

    def _own(self, mixer: str, width: int, members: int) -> float:
        found = self.shares[width, members]
        return found.get(mixer, mean(found.values()))


def trained_shares(store: Path) -> dict[tuple[str, int, str], float]:
    """The share of all epochs that a model's runs took, the longest, by expression, width and role."""
    longest: dict[tuple[str, int, str], int] = defaultdict(int)
    for record in Store(store).load()[0]:
        model = (record.label, record.spec.model.d_model, record.role)
        longest[model] = max(longest[model], record.epochs_run)
    return {model: epochs / EPOCHS for model, epochs in longest.items()}


def _family(expression: str) -> str:
    return re.split("[:*]", expression, maxsplit=1)[0]


def minutes(costs: Costs, models: list[tuple[str, int]], role: str, members: int, shares: dict) -> float:
    """Of one fleet of each model that was timed."""
    found = [(costs.mixer_of(expression), width, shares.get((expression, width, role), 1.0)) for expression, width in models]
    return sum(costs.seconds(mixer, width, members) * share for mixer, width, share in found if mixer) / 60


def main() -> None:
    """Prints seconds of a fleet and minutes of the recipe, by family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--trained", type=Path, metavar="STORE")
    args = parser.parse_args()
    records = [json.loads(path.read_text()) for path in args.records]
    shares = trained_shares(args.trained) if args.trained else {}
    costs = Costs([row for r in records for row in r["fleets"]], [row for r in records for row in r.get("validation", [])])
    plans = {"one seed": (LRS, 1), "three seeds": (LRS * SEEDS, SEEDS)}
    plans = {name: sizes for name, sizes in plans.items() if all((USUAL, members) in costs.shares for members in sizes)}
    models: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for experiment in readme_plot().experiments:
        models[_family(experiment.model.alias)].append((experiment.model.alias, experiment.model.d_model))
    totals = {name: [0.0, 0.0] for name in plans}
    for family, shapes in models.items():
        timed = next((mixer for expression, _ in shapes if (mixer := costs.mixer_of(expression))), None)
        if timed is None:
            print(f"{family:16} {len(shapes):3} models, not timed")
            continue
        line = f"{family:16} {len(shapes):3} models, {costs.seconds(timed, USUAL, LRS):5.0f} s a fleet of width {USUAL}"
        for name, sizes in plans.items():
            parts = [
                minutes(costs, shapes, role, members, shares) for role, members in zip(("select", "report"), sizes, strict=True)
            ]
            totals[name] = [sum(pair) for pair in zip(totals[name], parts, strict=True)]
            line += f"; {name} {parts[0]:5.1f} + {parts[1]:4.1f} min"
        print(line)
    for name, (chosen, reported) in totals.items():
        print(f"{name}: {chosen:.1f} + {reported:.1f} min to choose and to report, validation included")
    print("validation, in % of training:", {members: round(100 * share, 1) for members, share in sorted(costs.validation.items())})


if __name__ == "__main__":
    main()
