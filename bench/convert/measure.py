"""What a student kept, measured on held-out text against its teacher; and what its live cache holds.

Shape legend: B batch, T time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.convert.cache import layer_tensors
from bench.convert.spec import LayerPlan
from bench.convert.student import LinearizedForCausalLM, build_student

PROBE = 8
"""Tokens of the shorter of two prefills from which the growth of a cache is read."""
SINKS = 4


@torch.no_grad()
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
    sums = torch.zeros(4, dtype=torch.float64)
    for row in tokens_BT.to(teacher.device).split(1):
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bf16):
            found, wanted = (model(input_ids=row, use_cache=False).logits for model in (student, teacher))
        log_p, log_q = (logits[0, :-1].float().log_softmax(-1) for logits in (found, wanted))
        target = row[0, 1:, None]
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        same = log_p.argmax(-1) == log_q.argmax(-1)
        parts = (kl.mean(), same.float().mean(), -log_p.gather(1, target).mean(), -log_q.gather(1, target).mean())
        sums += torch.stack(parts).double().cpu()
    kl, top1, nll, teacher_nll = (sums / len(tokens_BT)).tolist()
    return {"kl": kl, "top1": top1, "ppl": math.exp(min(nll, 50)), "teacher_ppl": math.exp(min(teacher_nll, 50))}


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
