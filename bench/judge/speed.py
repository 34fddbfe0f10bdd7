"""Memory and speed of a model: bytes of its live cache, prefill and decode tokens/s, peak memory."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.convert.cache import layer_tensors
from bench.judge.decoding import decoder
from bench.judge.suites import Size
from bench.records import EvalMetric

REPEATS = 3
STEPS = {"cpu": 8, "cuda": 64}
"""Tokens decoded between two looks at the clock."""


@torch.no_grad()
def memory_and_speed(model: Any, size: Size) -> list[EvalMetric]:
    """Measures a model.

    Args:
        model: in evaluation mode, on its device.
        size: lengths and batch sizes.

    Returns:
        For each length the bytes of the cache of one sequence after a prefill, counted from its tensors, and the speed of the
        prefill; for each length and batch size the speed of decoding; and the peak memory of it all.
    """
    device = model.device
    reset_peak_memory(device)
    found: list[EvalMetric] = []
    for length in size.measured:
        tokens = torch.arange(length, device=device)[None] % min(1000, model.config.vocab_size)
        cache, seconds = _prefill(model, tokens)
        held = [tensor for layer in cache.layers for tensor in layer_tensors(layer)]
        at = str(length)
        state = float(sum(tensor.numel() * tensor.element_size() for tensor in held))
        found.append(EvalMetric(name="state_bytes", slice=at, value=state, n=1, higher_is_better=False))
        found.append(
            EvalMetric(name="prefill_tokens_per_second", slice=at, value=length / seconds, n=REPEATS, higher_is_better=True)
        )
        for batch in size.batches:
            speed, how = _decode(model, cache, batch)
            name = f"batch {batch}, context {length}, {how}"
            found.append(EvalMetric(name="decode_tokens_per_second", slice=name, value=speed, n=REPEATS, higher_is_better=True))
            cache, _ = _prefill(model, tokens, repeats=1)
    found.append(EvalMetric(name="peak_memory_bytes", value=float(peak_memory(device)), n=1, higher_is_better=False))
    return found


def _prefill(model: Any, tokens: Any, repeats: int = REPEATS) -> tuple[Any, float]:
    """The cache after reading one sequence, and the median time it takes; the first reading is not timed if there are several."""
    times, cache = [], None
    for turn in range(repeats + (repeats > 1)):
        cache = None
        began = _clock(model.device)
        cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).cache
        if turn or repeats == 1:
            times.append(_clock(model.device) - began)
    return cache, median(times)


def _decode(model: Any, cache: Any, batch: int) -> tuple[float, str]:
    """Tokens/s over all rows from a prefilled cache, and how it was run."""
    steps = STEPS[model.device.type]
    made = decoder(model, cache, batch, room=steps * (REPEATS + 1))
    token = torch.zeros(batch, dtype=torch.long, device=model.device)
    times = []
    for turn in range(REPEATS + 1):
        began = _clock(model.device)
        for _ in range(steps):
            token = made.step(token).argmax(-1)
        if turn:
            times.append(_clock(model.device) - began)
    return batch * steps / median(times), "CUDA graph" if made.graph is not None else "eager"


def _clock(device: Any) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device: Any) -> None:
    """Starts a new peak; on Linux that of the process too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    marks = Path("/proc/self/clear_refs")
    if marks.exists():
        marks.write_text("5")


def peak_memory(device: Any) -> int:
    """Most bytes held since the last reset: on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
