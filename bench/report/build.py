"""Builds the page: one HTML file with its data, styles, scripts and chart library inside, opened without a network."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UserError
from bench.points import Point, points
from bench.records import EvalRecord, RunRecord
from bench.report import charts, frames, judged_charts, speed_charts, styles
from bench.report.bridge import bridge
from bench.report.families import family_map
from bench.report.influence import Picture, picture
from bench.report.judged import judged_sections
from bench.report.place import require_place, unwritable
from bench.report.reproductions import figure_rows
from bench.report.speed import speed_section
from bench.spec import SELECTION_SEED, TaskSpec
from bench.speed_records import SpeedRecord
from bench.store import Store, atomic_write

if TYPE_CHECKING:
    import jinja2

HERE = Path(__file__).parent
MAX_PICTURES = 24


@dataclass
class ReportSummary:
    """What was written.

    Args:
        path: the HTML file.
        points: points on the page.
        runs: records on the page.
        evaluations: of language models.
        speeds: measured speeds on the page.
        bytes: size of the file.
        warnings: records that were skipped and points to be read with care.
    """

    path: Path
    points: int
    runs: int
    bytes: int
    evaluations: int = 0
    speeds: int = 0
    warnings: list[str] = field(default_factory=list)


def build_report(
    store: Store,
    out: Path,
    *,
    title: str = "Mixer Bench",
    task: str | None = None,
    specs: Collection[TaskSpec] | None = None,
    option: str = "--out",
) -> ReportSummary:
    """Writes the report of a store.

    Args:
        store: where the runs are.
        out: the HTML file to write; its folder is made if it is missing.
        title: heading of the page.
        task: name of the only task to show; None shows all.
        specs: tasks to show, options included; None shows all.
        option: the one that named the file.

    Raises:
        UserError: the store holds no run to show, or the file cannot be written.
    """
    require_place(out, option)
    whole_store = task is None and specs is None
    evals, eval_warnings = store.load_evals() if whole_store else ([], [])
    speeds, speed_warnings = store.load_speed()
    records, warnings = load_records(store, task, needed=not evals and not (speeds and whole_store))
    records = [record for record in records if specs is None or record.spec.task in specs]
    found = points(records)
    page, page_warnings = _render(found, evals, speeds, store, title, [*warnings, *eval_warnings, *speed_warnings])
    content = page.encode()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, content)
    except OSError as error:
        raise unwritable(out, error.strerror or type(error).__name__, option) from None
    return ReportSummary(out, len(found), len(records), len(content), len(evals), len(speeds), page_warnings)


def load_records(store: Store, task: str | None, *, needed: bool = True) -> tuple[list[RunRecord], list[str]]:
    """The records to report on, and the store's warnings.

    Args:
        store: to read.
        task: name of the only task to report on, or None.
        needed: whether a report without any makes no sense.

    Raises:
        UserError: there are none, unless they may be missing and no task is named.
    """
    records, warnings = store.load()
    if not records and needed:
        skipped = f" ({len(warnings)} unreadable record(s) were skipped)" if warnings else ""
        raise UserError(f"The store {store.root} holds no runs to report{skipped}; train some with bench synthetic --task mqar.")
    if task is None:
        return records, warnings
    chosen = [record for record in records if record.spec.task.name == task]
    if not chosen:
        held = ", ".join(sorted({record.spec.task.name for record in records}))
        raise UserError(f"The store {store.root} holds no runs of the task {task!r}; it holds runs of: {held}.")
    return chosen, warnings


def _render(
    found: Sequence[Point],
    evals: Sequence[EvalRecord],
    speeds: Sequence[SpeedRecord],
    store: Store,
    title: str,
    warnings: list[str],
) -> tuple[str, list[str]]:
    """The page as text, and every warning on it."""
    tasks = frames.task_rows(found)
    rows = frames.point_rows(found, tasks)
    curves, curve_warnings = frames.curve_rows(found, rows, store)
    pictures, picture_warnings = _pictures(found, rows, store)
    point_warnings = [f"{row['task_title']}, {row['name']}: {text}." for row in rows for text in row["warnings"]]
    speed = speed_section(found, rows, speeds)
    measured = [] if speed is None else speed["rows"]
    judged_mixers = [record.model.mixer for record in evals if record.model.mixer]
    shown = [*(point.mixer for point in found), *judged_mixers, *(row["mixer"] for row in measured if row["kind"] == "mixer")]
    look = styles.assign([*shown, *(row["mixer"] for row in measured)])
    judged, extras, judged_warnings = judged_sections(evals, store, look)
    bridged = bridge(found, evals, store, look)
    warnings = [*warnings, *curve_warnings, *picture_warnings, *point_warnings, *judged_warnings]
    for task in tasks:
        task["slices"] = frames.slice_names([p for p, row in zip(found, rows, strict=True) if row["task"] == task["id"]])
    reproduced = figure_rows(found, rows)
    data = _script_data(found, tasks, rows, look) | {
        "panels": [panel for figure in reproduced for panel in figure["panels"]],
        "curves": curves,
        "extras": [*extras, *(bridged["charts"] if bridged else []), *([] if speed is None else speed["groups"])],
        "speed": speed,
    }
    page = _filled(
        data,
        title=title,
        tasks=tasks,
        points=list(zip(found, rows, strict=True)),
        styles=look,
        judged=judged,
        bridged=bridged,
        evals=evals,
        curves=curves,
        families=data["families"],
        reproduced=reproduced,
        speed=speed,
        mixers=sorted(set(shown)),
        metrics=list(dict.fromkeys(name for task in tasks for name in task["metrics"])),
        pictures=sorted(pictures, key=lambda item: -(item[0]["accuracy"] or 0))[:MAX_PICTURES],
        pictures_made=len(pictures),
        warnings=warnings,
        failures=[(row, record) for point, row in zip(found, rows, strict=True) for record in point.failures],
        facts=_facts(found, evals, speeds),
        store=store.root,
    )
    return page, warnings


def _filled(data: dict[str, Any], **parts: Any) -> str:
    """The page's template with these parts, and with the data, styles and scripts inside."""
    import vl_convert
    from markupsafe import Markup

    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            **parts,
            selection_seed=SELECTION_SEED,
            axes=charts.AXES,
            data=Markup(_script_json(data)),
            css=Markup((HERE / "page.css").read_text("utf-8")),
            scripts=[Markup((HERE / name).read_text("utf-8")) for name in ("table.js", "text.js", "page.js")],
            bundle=Markup(vl_convert.javascript_bundle()),  # pyright: ignore[reportCallIssue] - its stub forgets the default
        )
    )


def _script_data(
    found: Sequence[Point], tasks: list[dict[str, Any]], rows: list[dict[str, Any]], look: dict[str, styles.Style]
) -> dict[str, Any]:
    """What the page's scripts read of the points: rows, scores by family, looks of the mixers, specifications of the charts."""
    return {
        "tasks": tasks,
        "points": rows,
        "mixers": {name: {"light": style.light, "dark": style.dark, "shape": style.shape} for name, style in look.items()},
        "axes": {axis: field for axis, (field, _) in charts.AXES.items()},
        "specs": charts.specs() | judged_charts.specs() | speed_charts.specs(),
        "csv": frames.csv_text(rows) if rows else "",
        "families": family_map(found, tasks),
    }


def _environment() -> jinja2.Environment:
    """The templates of this folder, with the filters they use."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": frames.percent,
        "metric": frames.metric_text,
        "bytes": frames.human_bytes,
        "signed": frames.signed,
    }
    return environment


def _pictures(
    found: Sequence[Point], rows: Sequence[dict[str, Any]], store: Store
) -> tuple[list[tuple[dict[str, Any], RunRecord, Picture]], list[str]]:
    """The influence map of the first reported run that has one, for each point; and a warning for each unreadable file."""
    pictures: list[tuple[dict[str, Any], RunRecord, Picture]] = []
    warnings: list[str] = []
    for point, row in zip(found, rows, strict=True):
        for record in point.reported:
            try:
                arrays = store.influence(record.run_id)
                if arrays is not None:
                    pictures.append((row, record, picture(arrays, point.name)))
                    break
            except (OSError, ValueError, KeyError) as error:
                path = store.path(record.run_id) / "influence.npz"
                warnings.append(f"Skipped {path}: not a readable influence map ({type(error).__name__}).")
    return pictures, warnings


def _facts(found: Sequence[Point], evals: Sequence[EvalRecord], speeds: Sequence[SpeedRecord]) -> dict[str, Any]:
    """What was run, where and when, over all records; speeds count where there is nothing else."""
    records = [record for point in found for record in point.records]
    everything = [*records, *evals] or speeds
    provenance = [record.provenance for record in everything]
    commits = Counter(
        (p.commit or "unknown") + (f" + uncommitted changes {p.diff_hash or ''}".rstrip() if p.dirty else "") for p in provenance
    )
    started = sorted(record.started for record in everything)
    hardware = [f"{frames.hardware(record)} ({record.device}, {record.precision})" for record in records]
    hardware += [f"{record.device} ({record.precision})" for record in evals]
    if not hardware:
        hardware = [f"{frames.hardware(record)} ({record.device}, {record.dtype})" for record in speeds]
    return {
        "evaluations": len(evals),
        "models": len({record.model.fingerprint for record in evals}),
        "runs": len(records),
        "statuses": dict(Counter(record.status for record in records)),
        "hardware": dict(Counter(hardware)),
        "commits": dict(commits),
        "commands": dict(Counter(p.command for p in provenance)),
        "versions": dict(Counter(", ".join(f"{name} {text}" for name, text in sorted(p.versions.items())) for p in provenance)),
        "backends": dict(Counter(record.backend for record in records)),
        "first": _date(started[0]),
        "last": _date(started[-1]),
        "train_hours": sum(record.train_seconds for record in records) / 3600,
        "built": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _date(started: str) -> str:
    """A record's start, to the minute where it is ISO 8601, else as it stands."""
    try:
        return datetime.fromisoformat(started).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return started


def _script_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings say."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028")
