"""lm-eval's own table, from stored records."""

from __future__ import annotations

from typing import Any

from bench.records import EvalRecord


def lm_eval_table(records: list[EvalRecord], groups: dict[str, Any]) -> str:
    """The table that lm-eval prints, groups such as mmlu with their means.

    Args:
        records: of one model.
        groups: lm-eval's groups by name.
    """
    from lm_eval.utils import make_table

    results: dict[str, Any] = {}
    for record in records:
        row: dict[str, Any] = {"alias": record.task, "sample_len": record.items}
        for item in record.metrics:
            if item.name == "peak_memory_bytes":
                continue
            name = item.slice or item.name
            row[f"{name},{item.filter}"] = item.value if item.value is not None else "N/A"
            row[f"{name}_stderr,{item.filter}"] = "N/A" if item.stderr is None else item.stderr
        results[record.task] = row
    better = {record.task: {item.slice or item.name: item.higher_is_better for item in record.metrics} for record in records}
    table: dict[str, Any] = {
        "results": results,
        "versions": {record.task: record.version for record in records},
        "n-shot": {record.task: record.fewshot for record in records},
        "higher_is_better": {task: {k: v for k, v in found.items() if v is not None} for task, found in better.items()},
    }
    whole = {name: group for name, group in groups.items() if all(t.task_name in results for t in group.get_all_tasks())}
    for name, group in whole.items():
        if group.has_aggregation:
            results[name] = dict(group.aggregate(results))
    table["group_subtasks"] = {name: group.child_names for name, group in whole.items() if name in results}
    return make_table(table)
