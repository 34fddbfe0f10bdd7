"""Times first calls on a CUDA device, and asks what later calls compile: python -m tests.benchmarks.first_call OUT.json [--jobs N].

Every case runs in a process of its own with an empty cache of Triton's, `--jobs` of them side by side. A case is one kernel of
`bench throughput` at one width and dtype, forward and backward or a decoded token. After the first call come other batch
sizes, lengths and head counts; what they compile is counted in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.throughput.draws import Draw
from bench.throughput.kernels import OPERATIONS
from bench.throughput.measure import timed_call
from bench.throughput.names import KERNELS
from tests.benchmarks.facts import facts

FIRST = (2, 256, 4)
LATER = ((3, 256, 4), (2, 333, 4), (2, 256, 5), (16, 64, 16), (1, 64, 1), (1, 4096, 2))
"""Batch, length and heads."""


class Case(NamedTuple):
    """One process."""

    kernel: str
    mode: str
    width: int
    dtype: str


def cases() -> list[Case]:
    """Every kernel at its widths, square ones at 256 too, the recurrences and attention in fp32, and a decoded token."""
    found = []
    for name, kernel in KERNELS.items():
        if name.endswith("_strong"):  # the same kernels
            continue
        widths = {*kernel.widths, 256} if kernel.layout == "square" else set(kernel.widths)
        found += [Case(name, "train", width, "bfloat16") for width in sorted(widths, reverse=True)]
        if kernel.layout in ("square", "ssd", "taylor"):
            found.append(Case(name, "train", 64, "float32"))
        if "decode" in kernel.modes:
            found.append(Case(name, "decode", max(kernel.widths), "bfloat16"))
    return found


def run_case(case: Case) -> dict[str, Any]:
    """Inside the process: seconds of the first call, and compiled kernels and seconds of the later ones."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            return {**case._asdict(), **_measured(case, Path(folder))}
        except Exception as error:  # a case that fails is a finding too
            return {**case._asdict(), "error": f"{type(error).__name__}: {error}"[:300]}


def _measured(case: Case, cache: Path) -> dict[str, Any]:
    draw = Draw(torch.device("cuda"), getattr(torch, case.dtype), torch.Generator("cuda").manual_seed(0))

    def compiled() -> set[Path]:
        return set(cache.glob("*/*.cubin"))

    def seconds(sizes: tuple[int, int, int]) -> float:
        shape = KERNELS[case.kernel].shape(*sizes, case.width)  # type: ignore[index]
        problem = OPERATIONS[case.kernel].problem(shape, case.mode, draw)  # type: ignore[index]
        torch.cuda.synchronize()
        began = time.perf_counter()
        timed_call(problem, gradients=case.mode == "train")()
        torch.cuda.synchronize()
        return round(time.perf_counter() - began, 3)

    first, kernels = seconds(FIRST), len(compiled())
    later = []
    for sizes in LATER:
        before = compiled()
        later.append({"sizes": sizes, "seconds": seconds(sizes), "compiled": sorted(path.stem for path in compiled() - before)})
    return {"first_s": first, "kernels": kernels, "later": later}


def main() -> None:
    """Writes all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=8)
    given = parser.parse_args()
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton", "bench.throughput.kernels", "bench.throughput.measure"])
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(given.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(run_case, case) for case in cases()]):
            row = done.result()
            rows.append(row)
            record = facts("python -m tests.benchmarks.first_call") | {"n": f"one first call a row, {given.jobs} side by side"}
            given.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    for row in sorted(rows, key=lambda row: -row.get("first_s", 1e9)):
        new = sorted({name for later in row.get("later", []) for name in later["compiled"]})
        print(row.get("first_s", row.get("error")), *(row[key] for key in Case._fields), row.get("kernels"), "later:", *new)


if __name__ == "__main__":
    main()
