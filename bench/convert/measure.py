"""What a student kept, measured on held-out text against its teacher; and what its live cache holds.

Shape legend: B batch, T time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bench.convert.cache import layer_tensors
from bench.convert.spec import LayerPlan
from bench.convert.student import LinearizedForCausalLM, build_student

PROBE = 8
"""Tokens of the shorter of two prefills from which the growth of a cache is read."""
SINKS = 4
MOST_LOGITS = 1 << 28
"""Of a forward pass on a GPU, where one sequence at a time would leave the device waiting for launches."""


def agreement(student: Any, teacher: Any, tokens_BT: Tensor, *, bf16: bool = False) -> dict[str, float]:
    """How close a student's next-token distributions are to its teacher's.

    Args:
        student: any causal language model.
        teacher: another with the same vocabulary.
        tokens_BT: held-out text.
        bf16: autocast.

    Returns:
        `kl`, nats per token; `top1`, share of tokens with the same first choice; `ppl` and `teacher_ppl` on the text.
    """
    means = {name: fmean(values) for name, values in agreement_by_row(student, teacher, tokens_BT, bf16=bf16).items()}
    ppl = {name: math.exp(min(means.pop(nll), 50)) for name, nll in (("ppl", "nll"), ("teacher_ppl", "teacher_nll"))}
    return means | ppl


@torch.no_grad()
def agreement_by_row(student: Any, teacher: Any, tokens_BT: Tensor, *, bf16: bool = False) -> dict[str, list[float]]:
    """`kl`, `top1`, `nll` and `teacher_nll` (nats per token) of every row; see `agreement`."""
    found: dict[str, list[float]] = {"kl": [], "top1": [], "nll": [], "teacher_nll": []}
    rows = 1 if teacher.device.type == "cpu" else max(1, MOST_LOGITS // (tokens_BT.shape[1] * teacher.config.vocab_size))
    for some_BT in tokens_BT.to(teacher.device).split(rows):
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bf16):
            logits = [model(input_ids=some_BT, use_cache=False).logits[:, :-1] for model in (student, teacher)]
        for row_T, *pair in zip(some_BT, *logits, strict=True):  # in fp32 one row at a time
            log_p, log_q = (part.float().log_softmax(-1) for part in pair)
            target = row_T[1:, None]
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            same = (log_p.argmax(-1) == log_q.argmax(-1)).float()
            parts = (kl.mean(), same.mean(), -log_p.gather(1, target).mean(), -log_q.gather(1, target).mean())
            for name, value in zip(found, torch.stack(parts).tolist(), strict=True):
                found[name].append(value)
    return found


@torch.no_grad()
def cache_bytes(model: Any) -> tuple[int, int]:
    """Bytes of a live cache for one sequence: the constant part, and the growth per token.

    Args:
        model: a teacher or a student.
    """

    def after(length: int) -> int:
        tokens = torch.zeros(1, length, dtype=torch.long, device=model.device)
        cache = model(input_ids=tokens, use_cache=True).cache
        held = [tensor for layer in cache.layers for tensor in layer_tensors(layer)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    short, long = after(PROBE), after(2 * PROBE)
    growth = (long - short) // PROBE
    return short - growth * PROBE, growth


def window_of_equal_bytes(student: Any, teacher: Any) -> int:
    """The window that, with four sinks and without training, may hold as many bytes as the student's state."""
    constant, _ = cache_bytes(student)
    _, per_token = cache_bytes(teacher)
    return max(1, constant // per_token - SINKS + 1)


def window_student(teacher: Any, window: int) -> LinearizedForCausalLM:
    """The untrained baseline: window and four sinks in every layer."""
    plan = LayerPlan(mixer=None, window=window, sinks=SINKS, combine="sum")
    return build_student(teacher, [plan] * len(teacher.model.layers)).eval()


@contextlib.contextmanager
def ablated(student: LinearizedForCausalLM, branch: Any) -> Iterator[None]:
    """Within it, only one branch of every converted layer speaks."""
    student.ablate(branch)
    try:
        yield
    finally:
        student.ablate("both")


def referee_rows(student: LinearizedForCausalLM, teacher: Any, tokens_BT: Tensor, *, bf16: bool = False) -> dict[str, Any]:
    """The rows that stand beside a student: equal bytes of window without training, and one branch alone.

    Args:
        student: trained.
        teacher: its teacher.
        tokens_BT: held-out text.
        bf16: autocast.
    """
    rows: dict[str, Any] = {"student": agreement(student, teacher, tokens_BT, bf16=bf16)}
    plans = [plan for plan in student.plans if plan is not None]
    if not plans:
        return rows
    window = window_of_equal_bytes(student, teacher)
    rows[f"window {window} + {SINKS} sinks, untrained, equal bytes"] = agreement(
        window_student(teacher, window), teacher, tokens_BT, bf16=bf16
    )
    if all(plan.mixer is not None and plan.window for plan in plans):
        for branch in ("window", "mixer"):
            with ablated(student, branch):
                rows[f"{branch} only"] = agreement(student, teacher, tokens_BT, bf16=bf16)
    return rows
