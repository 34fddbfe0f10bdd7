"""Prints the tables of docs/throughput.md from a store of speeds and records of other benchmarks.

    python -m tests.benchmarks.speed_table STORE [--small FILE] [--decode FILE] [--first FILE]

The store holds what `bench throughput --preset kernels` or `tests.benchmarks.peers` measured, the files what
`tests.benchmarks.small_shape`, `decode_step` and `first_call` wrote. Goals are in milliseconds, forward / forward and
backward, at B=8 H=16 T=2048.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

from bench.speed_records import Peer, SpeedRecord
from bench.store import Store

MODES = ("forward", "train")
MODE_NAMES = {"forward": "forward", "train": "forward and backward"}
MAIN_LENGTH, LENGTHS = 2048, (512, 8192, 32_768)
LONGEST_RATIO, PEER_RATIO = 1.3, 2.0
SMALL_GOALS = {"forward": 100.0, "both": 350.0}
SMALL_FLOOR_RATIO = 2.5
DECODE_GOALS = {64: 36.0, 256: 140.0}
FIRST_SECONDS = 10.0


class Goal(NamedTuple):
    """A row of the table.

    Args:
        kernel: of `bench list kernels`.
        width: of its heads.
        forward: milliseconds to reach, or None.
        both: of forward and backward.
        peers: to be this many times as fast as the best peer.
        floor: to take at most this many times the bound.
    """

    kernel: str
    width: int
    forward: float | None = None
    both: float | None = None
    peers: float | None = None
    floor: float | None = None

    def of(self, mode: str) -> float | None:
        """Milliseconds to reach in a mode."""
        return self.forward if mode == "forward" else self.both


GOALS = (
    *(Goal(kernel, 128, 0.088, 0.33) for kernel in ("linear", "constant_decay", "scalar_decay")),
    *(Goal(kernel, 64, 0.043, 0.15) for kernel in ("linear", "constant_decay", "scalar_decay")),
    Goal("ssd", 64, 0.07, 0.28),
    Goal("delta", 128, 0.113, 0.64),
    Goal("delta", 64, 0.075, 0.33),
    Goal("gated_delta", 128, 0.120, 0.60),
    Goal("gated_delta", 64, 0.08, 0.35),
    *(Goal(kernel, 128, 0.30, 1.2) for kernel in ("gla", "gla_strong")),
    *(Goal(kernel, 128, 0.35, 1.6) for kernel in ("kda", "kda_strong")),
    Goal("taylor", 64, 0.10, 0.40),
    Goal("chosen_blocks", 128, peers=2.0),
    Goal("window", 128, 0.125, 0.52),
    Goal("selective_scan", 256, floor=3.0),
)


class Speeds:
    """The rows of a store by kernel, width, mode and length; those at sixteen heads and, for channels, of any number.

    Args:
        records: of a store.
    """

    def __init__(self, records: list[SpeedRecord]) -> None:
        self.records = [record for record in records if record.subject == "kernel"]

    def find(self, goal: Goal, mode: str, length: int = MAIN_LENGTH) -> SpeedRecord | None:
        """The row that a goal is about."""
        for record in self.records:
            same = (record.name, record.mode, record.shape["length"]) == (goal.kernel, mode, length)
            if same and _width(record) == goal.width and record.shape["heads"] >= 16:
                return record
        return None


def _width(record: SpeedRecord) -> int:
    shape = record.shape
    return shape["value"] if shape["value"] > 1 else shape["heads"] // 16


def ms(record: SpeedRecord | None) -> float | None:
    """Graph time."""
    return None if record is None or record.graph is None else record.graph.median_us / 1e3


def text(value: float | None, digits: int = 3) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def pair(values: list[float | None], digits: int = 3) -> str:
    """Forward / both."""
    return " / ".join(text(value, digits) for value in values)


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def head(*cells: str) -> str:
    """The first two lines of one."""
    return row(*cells) + "\n" + row(*["---"] * len(cells))


def peer_ms(peer: Peer | None) -> float | None:
    """Graph time of a peer."""
    return None if peer is None or peer.graph is None else peer.graph.median_us / 1e3


def is_met(goal: Goal, record: SpeedRecord | None) -> bool | None:
    """Whether a measured row reaches its goal; None where nothing can be said."""
    time, bound = ms(record), None if record is None else record.bound_ratio()
    if record is None or time is None or bound is None:
        return None
    if goal.floor is not None:
        return bound <= goal.floor
    if goal.peers is not None:
        over = record.peer_ratio()
        return None if over is None else over >= goal.peers
    wanted = goal.of(record.mode)
    return None if wanted is None else time <= wanted


def main_table(speeds: Speeds) -> Iterator[str]:
    """Every goal: ours, the bound, the best peer, met or not."""
    yield head("kernel", "D", "ours", "goal", "bound", "x bound", "best peer", "x peer", "met")
    for goal in GOALS:
        records = [speeds.find(goal, mode) for mode in MODES]
        best = [record and record.best_peer() for record in records]
        names = list(dict.fromkeys(peer.name for peer in best if peer))
        wanted = (
            pair([goal.forward, goal.both]) if goal.forward else f"{goal.peers} x peer" if goal.peers else f"{goal.floor} x bound"
        )
        met = [{True: "yes", False: "no", None: "?"}[is_met(goal, record)] for record in records]
        yield row(
            goal.kernel,
            goal.width,
            pair([ms(record) for record in records]),
            wanted,
            pair([record and record.bound.microseconds / 1e3 for record in records]),
            pair([record and record.bound_ratio() for record in records], 2),
            f"{pair([peer_ms(peer) for peer in best])} {', '.join(names)}" if names else "-",
            pair([record and record.peer_ratio() for record in records], 2),
            " / ".join(met),
        )


def length_table(speeds: Speeds) -> Iterator[str]:
    """The ratio to the bound over length, by that at the main length, and the ratio to the best peer."""
    yield head("kernel", "D", *(f"T={n}: x bound, by T={MAIN_LENGTH} (x peer)" for n in LENGTHS), "within 1.3")
    for goal in GOALS:
        cells, worst = [], 0.0
        for length in LENGTHS:
            found = [(speeds.find(goal, mode, length), speeds.find(goal, mode)) for mode in MODES]
            ratios = [_by(record, main) for record, main in found]
            over = [record and record.peer_ratio() for record, _ in found]
            worst = max([worst, *(ratio for ratio in ratios if ratio is not None)])
            cells.append(f"{pair(ratios, 2)} ({pair(over, 2)})")
        yield row(goal.kernel, goal.width, *cells, "?" if not worst else "yes" if worst <= LONGEST_RATIO else f"no, {worst:.2f}")


def _by(record: SpeedRecord | None, main: SpeedRecord | None) -> float | None:
    own, base = (x and x.bound_ratio() for x in (record, main))
    return own / base if own and base else None


def goals_met(speeds: Speeds) -> str:
    """How many goals of the main shape are reached."""
    met = [is_met(goal, speeds.find(goal, mode)) for goal in GOALS for mode in MODES]
    return f"Met: {met.count(True)} of {len(met)}, not met: {met.count(False)}, not measured: {met.count(None)}."


def compared(speeds: Speeds) -> Iterator[tuple[str, float]]:
    """Every row with a goal, at every length and mode that has a peer's time: what it is, and the best peer's time over ours."""
    for goal in GOALS:
        for length in (MAIN_LENGTH, *LENGTHS):
            for mode in MODES:
                record = speeds.find(goal, mode, length)
                if record is not None and (ratio := record.peer_ratio()):
                    yield f"{goal.kernel} D={goal.width} T={length} {MODE_NAMES[mode]}", ratio


def geometric_mean(speeds: Speeds) -> Iterator[str]:
    """Of the best peer's time over ours, and the rows that the peer wins."""
    known = dict(compared(speeds))
    if not known:
        yield "No peer was timed."
        return
    mean = exp(sum(map(log, known.values())) / len(known))
    slower = sorted((ratio, what) for what, ratio in known.items() if ratio < 1)
    yield f"Geometric mean over {len(known)} rows with a peer: {mean:.2f} (goal {PEER_RATIO}); slower than the peer: {len(slower)}."
    yield "; ".join(f"{what} ({ratio:.2f})" for ratio, what in slower)


def small_table(found: dict[str, Any]) -> Iterator[str]:
    """Eager and graph times of the small shape, in microseconds."""
    yield head(
        "recurrence", "eager", "met (100 / 350)", "both, one thread", "graph", "x bound", f"within {SMALL_FLOOR_RATIO}", "launches"
    )
    for one in found["rows"]:
        if "error" in one:
            yield row(one["kernel"], one["error"], *["-"] * 6)
            continue
        eager = [one[f"{mode}_eager_us"] for mode in SMALL_GOALS]
        bounds = [
            one[f"{mode}_graph_us"] / one[f"{mode}_bound_us"] if one.get(f"{mode}_bound_us") else None for mode in SMALL_GOALS
        ]
        yield row(
            one["kernel"],
            pair(eager, 0),
            " / ".join("yes" if time <= goal else "no" for time, goal in zip(eager, SMALL_GOALS.values(), strict=True)),
            text(one.get("both_one_thread_us"), 0),
            pair([one[f"{mode}_graph_us"] for mode in SMALL_GOALS], 1),
            pair(bounds, 1),
            " / ".join("?" if ratio is None else "yes" if ratio <= SMALL_FLOOR_RATIO else "no" for ratio in bounds),
            " / ".join(str(one.get(f"{mode}_launches", "-")) for mode in SMALL_GOALS),
        )


def decode_table(found: dict[str, Any], speeds: Speeds) -> Iterator[str]:
    """Microseconds of decoding steps with D=128, and the best public step in the store."""
    yield head("step, D=128", "B=64 (goal 36)", "B=256 (goal 140)")
    rows = {one["batch"]: one for one in found["rows"] if one.get("width") == 128}
    sizes = [batch for batch in DECODE_GOALS if batch in rows]
    yield row("gated delta rule alone", *(rows[batch]["bare_us"] for batch in sizes))
    for layer in rows[sizes[0]]["layer_us"] if sizes else ():
        yield row(f"{layer} with convolution, norm and gate", *(rows[batch]["layer_us"][layer] for batch in sizes))
    yield row("bytes of the states, in place", *(rows[batch]["in_place_us"] for batch in sizes))
    for name in dict.fromkeys(record.name for record in speeds.records if record.mode == "decode"):
        cells = [_decoded(speeds, name, batch) for batch in DECODE_GOALS]
        if any(cell != "-" for cell in cells):
            yield row(f"{name}: ours, peer", *cells)


def _decoded(speeds: Speeds, name: str, batch: int) -> str:
    for record in speeds.records:
        if (record.name, record.mode, record.shape["batch"], record.shape["value"]) == (
            name,
            "decode",
            batch,
            128,
        ) and record.graph:
            peer = peer_ms(record.best_peer())
            return f"{record.graph.median_us:.1f}" + (f", {1e3 * peer:.1f}" if peer else "")
    return "-"


def first_table(found: dict[str, Any]) -> Iterator[str]:
    """First calls that take longest, and what later sizes compiled."""
    rows = [one for one in found["rows"] if "first_s" in one]
    late = [one for one in rows if one["first_s"] > FIRST_SECONDS]
    again = [one for one in rows if any(later["compiled"] for later in one["later"])]
    yield f"{len(rows)} of {len(found['rows'])} cases ran ({found['n']})."
    yield f"{len(late)} took more than {FIRST_SECONDS:.0f} s, {len(again)} compiled again for other sizes.\n"
    yield head("kernel", "mode", "D", "dtype", "first call, s", "kernels", "compiled by other sizes")
    shown = sorted(rows, key=lambda one: -one["first_s"])
    for one in [one for index, one in enumerate(shown) if index < 8 or one in late or one in again]:
        new = sorted({name for later in one["later"] for name in later["compiled"]})
        cells = (one[key] for key in ("kernel", "mode", "width", "dtype", "first_s", "kernels"))
        yield row(*cells, ", ".join(new) or "nothing")


def main() -> None:
    """Prints every table there is something for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    for name in ("small", "decode", "first"):
        parser.add_argument(f"--{name}", type=Path)
    given = parser.parse_args()
    records, warnings = Store(given.store).load_speed()
    speeds = Speeds(records)
    parts = [*warnings, *main_table(speeds), "", goals_met(speeds), "", *length_table(speeds), "", *geometric_mean(speeds)]
    if given.small:
        parts += ["", *small_table(json.loads(given.small.read_text()))]
    if given.decode:
        parts += ["", *decode_table(json.loads(given.decode.read_text()), speeds)]
    if given.first:
        parts += ["", *first_table(json.loads(given.first.read_text()))]
    print("\n".join(parts))


if __name__ == "__main__":
    main()
