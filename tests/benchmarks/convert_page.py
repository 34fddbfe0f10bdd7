"""What `convert_quality judge` and `convert_students_speed` wrote, as a store that `bench report --store` reads.

    python -m tests.benchmarks.convert_page results/measured/convert_{main,equal_tokens}_h200 --store page \
        --speeds results/measured/convert_students_speed{,_mixers}_h200.json
    bench report --store page -o page.html

Nothing is measured here. Of every family and distance the first items are taken that all models were asked, so that rows pair.
An item's length is that of its prompt: the distance and what stands before the fact.
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.convert.resolve import resolve_recipe
from bench.judge.suites import AGREEMENT, MEMORY_AND_SPEED
from bench.records import EvalMetric, EvalRecord, JudgedModel, Provenance
from bench.spec import digest
from bench.store import Store
from tests.benchmarks.convert_quality import EXPERIMENTS
from tests.benchmarks.convert_recall import BEFORE

TASKS = {"needle": "bench_needle", "lookup": "bench_phone_book"}
"""The page's recall tasks that the families belong to; `version` says that the items are those of convert_recall."""
LAYERS, PARAMETERS, LONGEST = 30, 134_515_008, 4096
"""SmolLM2-135M, and a length at which a growing cache is counted."""


def model(name: str, result: dict[str, Any]) -> JudgedModel:
    """Who was judged; a student's plan is that of its experiment."""
    report = result["report"]
    common = {"fingerprint": name, "name": name, "source": name, "layers": LAYERS}
    if name == "teacher":
        return JudgedModel(kind="plain", parameters=PARAMETERS, **common)
    if not report:
        window = int(name.partition("_")[2])
        common["name"] = f"window {window} + 4 sinks, untrained"
        return JudgedModel(kind="window", parameters=PARAMETERS, teacher="teacher", window=window, sinks=4, **common)
    plan = planned(EXPERIMENTS.get(name, ["--recipe", report["recipe_name"]]))
    made = {key: report[key] for key in ("recipe_name", "tokens", "seed", "data_hash")}
    fields = {"mixer": plan.mixer, "window": plan.window or None, "sinks": plan.sinks, "combine": plan.combine, "conversion": made}
    referees = {"teacher": "teacher", "window": "window_252"}
    return JudgedModel.model_validate(
        {"kind": "converted", "parameters": report["parameters"], "teacher": "teacher", "referees": referees}
        | {"layers_converted": LAYERS if plan.layers == "all" else LAYERS // 2, **common, **fields}
    )


def planned(arguments: list[str]) -> Any:
    """The layer plan of a command line of `bench convert`."""
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    given, settings = dict(pairs), [value for name, value in pairs if name == "--set"]
    window = int(given["--window"]) if "--window" in given else None
    named = {"mixer": given.get("--mixer"), "layers": given.get("--layers"), "settings": settings}
    return resolve_recipe(given["--recipe"], window=window, **named).plan


def metric(name: str, values: list[float], at: str = "") -> EvalMetric:
    """The mean of items with its standard error."""
    mean, n = sum(values) / len(values), len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, n - 1) / n)
    return EvalMetric(name=name, slice=at, value=mean, stderr=error, n=n, higher_is_better=True)


def write(store: Store, name: str, result: dict[str, Any], asked: int, speeds: dict[str, Any] | None) -> None:
    """The records of one model; its speeds are of a run of their own."""
    info = model(name, result)
    state = float(result["state_bytes"] + result["bytes_per_token"] * LONGEST)
    measured, origin = [EvalMetric(name="state_bytes", slice=str(LONGEST), value=state, n=1)], result
    if speeds:
        measured, origin = [EvalMetric.model_validate(metric) for metric in speeds["models"][name]], speeds
    held = [
        EvalMetric(name=key, value=result["held_out"][key], n=1, higher_is_better=key == "top1") for key in ("top1", "kl", "ppl")
    ]
    save(store, info, origin, MEMORY_AND_SPEED, "state_bytes", measured)
    save(store, info, result, AGREEMENT, "top1", held)
    for family, task in TASKS.items():
        right = {int(key.split()[1]) + BEFORE: hits[:asked] for key, hits in result["recall"].items() if key.startswith(family)}
        metrics = [metric("acc", [float(hit) for hits in right.values() for hit in hits])]
        metrics += [metric("acc", [float(hit) for hit in hits], str(length)) for length, hits in right.items()]
        blank = {"filter": "none", "given": "", "wanted": "", "metric": "acc"}
        items = [
            {"item": f"{length}:{index}", "length": length, "value": float(hit), **blank}
            for length, hits in right.items()
            for index, hit in enumerate(hits)
        ]
        save(store, info, result, task, "acc", metrics, items, chance=0.0)


def save(
    store: Store,
    info: JudgedModel,
    result: dict[str, Any],
    task: str,
    primary: str,
    metrics: list[EvalMetric],
    items: Any = (),
    **more: Any,
) -> None:
    """One record, with the commit and versions of the judgement."""
    common = {"commit": result["commit"], "dirty": None, "diff_hash": None, "code": {}, "command": ""}
    origin = Provenance.model_validate({**common, "versions": result["versions"], "hardware": {"gpu": result["device"]}})
    record = EvalRecord(
        eval_id="eval-" + digest(["convert_page", info.fingerprint, task]),
        model=info,
        task=task,
        protocol="log-likelihood" if items else "measured",
        version="convert_recall" if items else "1",
        items=len(items),
        items_total=len(items),
        items_hash=digest([task, len(items)]),
        lengths=sorted({item["length"] for item in items}),
        primary=primary,
        metrics=metrics,
        device=result["device"],
        precision="bf16",
        batch_size="auto",
        max_length=LONGEST,
        seconds=0.0,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance=origin,
        **more,
    )
    store.write_eval(record, items)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judged", nargs="+", type=Path, help="folders of `convert_quality judge`")
    parser.add_argument(
        "--speeds", nargs="+", type=Path, default=[], help="records of `convert_students_speed`; of a model in several, the last"
    )
    parser.add_argument("--store", type=Path, required=True)
    given = parser.parse_args()
    found = {path.stem: json.loads(path.read_text()) for folder in given.judged for path in sorted(folder.glob("*.json"))}
    asked = min(len(hits) for result in found.values() for hits in result["recall"].values())
    records = [json.loads(path.read_text()) for path in given.speeds]
    speeds = {name: record for record in records for name in record["models"]}
    for name, result in found.items():
        write(Store(given.store), name, result, asked, speeds.get(name))
    print(f"{len(found)} models, {asked} items a family and distance: {given.store}")


if __name__ == "__main__":
    main()
