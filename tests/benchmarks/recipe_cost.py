"""What the recall-memory plot costs on one GPU, estimated from the steps that `fleet_speed` has timed: minutes by family.

    python -m tests.benchmarks.recipe_cost RECORD.json [MORE.json ...]

A step of four learning rates is taken apart into tokens and labelled rows: attention's cells of 256 tokens, timed with 16 and 64
pairs, tell what a row costs, the same for all mixers, and each mixer's own cells of 64 and 256 tokens what the rest costs, taken
as linear in between. Widths 64 and 256 count as the shares of width 128 that a prototype of this trainer took (results/measured
has no record of it); the reported run, alone, as the share that attention and BASED take alone. Training only: 32 epochs, no
early stop, no validation, no compiling, which overlap with it where several workers share a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from bench.recipes.readme_plot import readme_plot

EPOCHS = 32
STEPS = {(64, 4): 391, (128, 8): 79, (256, 16): 79, (256, 32): 79, (256, 64): 79}
"""Steps of an epoch by tokens and pairs."""
WIDTH_SHARES = {48: 0.53, 64: 0.59, 128: 1.0, 256: 1.93}
FAMILIES = {"sliding_window": "attention", "delta_net": "gated_delta_net"}
"""Mixers that were not timed, and whose steps stand for theirs."""


def seconds_of_fleets(rows: list[dict]) -> dict[str, float]:
    """Seconds that four runs of width 128 train together, by mixer."""
    timed = {row["mixer"].split(":")[0].split("*")[0]: row["cells"] for row in rows if (row["width"], row["members"]) == (128, 4)}
    attention = next(
        row["cells"]
        for row in rows
        if (row["mixer"], row["width"], row["members"]) == ("attention", 128, 4) and "256x64" in row["cells"]
    )
    a_pair = (attention["256x64"]["ms"] - attention["256x16"]["ms"]) / 48

    def epoch(cells: dict) -> float:
        short, long = cells["64x4"]["ms"] - 4 * a_pair, cells["256x16"]["ms"] - 16 * a_pair
        steps = ((short + (long - short) * (tokens - 64) / 192 + pairs * a_pair, count) for (tokens, pairs), count in STEPS.items())
        return sum(ms * count for ms, count in steps) / 1e3

    return {mixer: EPOCHS * epoch(cells) for mixer, cells in timed.items()}


def alone(rows: list[dict]) -> float:
    """Share of a fleet's time that a single run takes, over those that were timed both ways on all cells."""
    totals = {
        (row["mixer"], row["members"]): sum(
            row["cells"][f"{tokens}x{pairs}"]["ms"] * count for (tokens, pairs), count in STEPS.items()
        )
        for row in rows
        if row["width"] == 128 and len(row["cells"]) == len(STEPS)
    }
    both = [mixer for mixer, members in totals if members == 1 and (mixer, 4) in totals]
    return sum(totals[mixer, 1] for mixer in both) / sum(totals[mixer, 4] for mixer in both)


def main() -> None:
    """Prints seconds of a fleet and minutes of the recipe, by family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, nargs="+")
    rows = [row for path in parser.parse_args().records for row in json.loads(path.read_text())["fleets"]]
    fleet, share = seconds_of_fleets(rows), alone(rows)
    models: dict[str, list[float]] = defaultdict(list)
    for experiment in readme_plot().experiments:
        models[experiment.model.mixer()].append(WIDTH_SHARES[experiment.model.d_model])
    total = 0.0
    for mixer, widths in models.items():
        seconds = fleet.get(FAMILIES.get(mixer, mixer))
        if seconds is None:
            print(f"{mixer:16} {len(widths):3} models, not timed")
            continue
        minutes = seconds * sum(widths) / 60
        total += minutes * (1 + share)
        print(
            f"{mixer:16} {len(widths):3} models, {seconds:5.0f} s a fleet of width 128, {minutes:5.1f} + {minutes * share:4.1f} min"
        )
    print(f"in all {total:.0f} min of training; a single run takes {share:.2f} of its fleet")


if __name__ == "__main__":
    main()
