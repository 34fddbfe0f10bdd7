"""`bench throughput`: how fast mixers and kernels are, beside what the device allows and what public peers do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bench.commands.console import Output, bytes_text
from bench.device import resolve_device
from bench.speed_records import SpeedRecord, Timing
from bench.store import Store
from bench.throughput.plan import Row, SpeedRequest, plan

if TYPE_CHECKING:
    from bench.throughput.measure import Session


CACHE = "TRITON_CACHE_DIR"


@dataclass(frozen=True)
class Options:
    """What is not about the rows themselves."""

    device: str
    store: Path
    with_peers: bool
    dry_run: bool


def run(request: SpeedRequest, options: Options, output: Output) -> int:
    """Times every row, writes a record of each, and prints a table.

    Returns:
        The exit code: 1 if a row is wrong or failed, else 0.

    Raises:
        UserError: unknown names or values, a mixer that there is not at one of the widths, or a store that cannot be written.
    """
    device = resolve_device(options.device)
    rows = plan(request, device.kind)
    if options.dry_run:
        return _print_plan(rows, output)
    _require_mixers(rows)
    store = Store(options.store)
    store.check_writable()
    with _empty_cache():
        records = _measure(rows, _session(device.kind, options, output), store, output)
    output.console.print(_table(records))
    _explain(records, output)
    output.say(f"{len(records)} rows in {store.root / 'speed'}; `bench report --store {store.root}` plots them.")
    return 1 if any(record.status in ("wrong", "failed") for record in records) else 0


def _require_mixers(rows: list[Row]) -> None:
    """Builds every mixer once, so that one that refuses its width or options is bad input and no row that failed."""
    longest: dict[tuple[Any, int], int] = {}
    for row in rows:
        if row.kind == "mixer":
            longest[row.layers, row.width] = max(row.length, longest.get((row.layers, row.width), 0))
    if longest:
        from bench.throughput.mixers import Stack

        for (layers, width), length in longest.items():
            Stack(layers, width, length + 1)


@contextmanager
def _empty_cache() -> Iterator[None]:
    """Lets Triton compile into an empty folder, so that the seconds of first calls mean something; a folder that is set stays."""
    if CACHE in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = folder
        try:
            yield
        finally:
            del os.environ[CACHE]


def _session(kind: str, options: Options, output: Output) -> Session:
    """Loads torch, measures the ceilings and says them."""
    import torch

    from bench.throughput.measure import Session

    session = Session(torch.device(kind), with_peers=options.with_peers)
    ceilings = session.ceilings
    copied, product = ceilings.copy_bytes_per_second / 1e9, ceilings.product_flops_per_second / 1e12
    output.say(f"Device: {session.hardware.get('gpu', session.hardware['cpu'])}.")
    output.say(f"Ceilings of this run: copy {copied:,.0f} GB/s, {ceilings.product_dtype} product {product:,.2f} TFLOP/s.")
    if kind == "cpu":
        output.say("On a CPU there is no graph time and no device memory to report; times are calls from Python.")
    output.emit("ceilings", ceilings._asdict())
    return session


def _measure(rows: list[Row], session: Session, store: Store, output: Output) -> list[SpeedRecord]:
    records: list[SpeedRecord] = []
    for index, row in enumerate(rows):
        record = session.measure(row)
        store.write_speed(record)
        records.append(record)
        output.emit("speed", {**record.model_dump(mode="json", exclude={"provenance"}), **_ratios(record)})
        output.say(f"[{index + 1}/{len(rows)}] {row.text()}: {_outcome(record)}")
        if session.lost:
            output.say(
                f"An error left the device unusable; {len(rows) - index - 1} rows were not measured. Run them by themselves."
            )
            break
    return records


def _print_plan(rows: list[Row], output: Output) -> int:
    for row in rows:
        output.say(row.text())
        output.emit("plan", {"subject": row.kind, "name": row.name, "mode": row.mode, "dtype": row.dtype, **row.sizes()})
    output.say(f"{len(rows)} rows; nothing was timed.")
    return 0


def _ratios(record: SpeedRecord) -> dict[str, Any]:
    return {"bound_ratio": record.bound_ratio(), "peer_ratio": record.peer_ratio()}


def _outcome(record: SpeedRecord) -> str:
    timing = record.timing()
    if timing is None:
        return f"{record.status}: {record.reason}"
    return f"{_time_text(timing)}, {record.path}"


def _table(records: list[SpeedRecord]) -> Table:
    """Every row; without a green gate there is no number."""
    table = Table(title="throughput")
    for column in ("name", "mode", "shape"):
        table.add_column(column, no_wrap=True)
    table.add_column("path", overflow="fold")
    numbers = ("graph", "eager", "tokens/s", "x bound", "x peer", "memory", "first call")
    shown = [column for column in numbers if not (column in ("graph", "memory") and all(r.graph is None for r in records))]
    for column in shown:
        table.add_column(column, justify="right", no_wrap=True)
    for record in records:
        cells = _cells(record)
        table.add_row(record.name, record.mode, shape_text(record), record.path, *(cells[column] for column in shown))
    return table


def _cells(record: SpeedRecord) -> dict[str, str]:
    if record.timing() is None:
        red = {"wrong": "gate red", "failed": "failed", "oom": "no memory"}[record.status]
        return dict.fromkeys(("graph", "eager", "tokens/s", "x bound", "x peer", "memory", "first call"), "-") | {"eager": red}
    bound, peer, speed = record.bound_ratio(), record.peer_ratio(), record.tokens_per_second
    return {
        "graph": "-" if record.graph is None else _time_text(record.graph),
        "eager": "-" if record.eager is None else _time_text(record.eager),
        "tokens/s": "-" if speed is None else f"{speed:,.0f}",
        "x bound": "-" if bound is None else f"{bound:.2f}",
        "x peer": "-" if peer is None else f"{peer:.2f}",
        "memory": "-" if record.peak_memory_bytes is None else bytes_text(record.peak_memory_bytes),
        "first call": "-" if record.first_call_seconds is None else f"{record.first_call_seconds:.2f} s",
    }


def shape_text(record: SpeedRecord) -> str:
    """B8 T2048 H16 D128; K and V where they differ, G where heads share keys, the model's width for a mixer."""
    shape = record.shape
    text = f"B{shape['batch']} T{shape['length']}"
    if "d_model" in shape:
        return f"{text} d{shape['d_model']}"
    text += f" H{shape['heads']}" + (f" G{shape['groups']}" if shape["groups"] not in (1, shape["heads"]) else "")
    return f"{text} D{shape['key']}" if shape["key"] == shape["value"] else f"{text} K{shape['key']} V{shape['value']}"


def _time_text(timing: Timing) -> str:
    return f"{timing.median_us:,.1f} us" if timing.median_us < 1e4 else f"{timing.median_us / 1e3:,.1f} ms"


def _explain(records: list[SpeedRecord], output: Output) -> None:
    """Reasons of rows and peers without a time, and what the columns mean."""
    for record in records:
        if record.reason:
            output.say(f"{record.status}: {record.name} {record.mode} {shape_text(record)}: {record.reason}")
    reasons = {(peer.name, record.mode, peer.reason) for record in records for peer in record.peers if peer.reason}
    for name, mode, reason in sorted(reasons):
        output.say(f"peer {name} ({mode}) has no time: {reason}")
    output.say(
        "x bound: time over the least that bytes and operations allow (1 is perfect). x peer: the best peer's time over ours."
    )
