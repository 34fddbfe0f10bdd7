"""Which key heads of a teacher recall from afar, found by gates.

Every key head gets a gate between its whole attention and the plan's window (DuoAttention, Xiao et al. 2024). The gates alone
train: answers about facts far back should stay what the teacher's are, and every gate that stays open costs.

Shape legend: N texts, T tokens, A answer tokens, V vocabulary, B batch, H query heads, G key heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.convert.branches import WindowBranch
from bench.convert.data import TrainingData
from bench.convert.far import written
from bench.convert.rendered import single_fact
from bench.convert.spec import LayerPlan
from bench.convert.student import build_student
from bench.errors import UserError
from mixers import State

PRICE = 2.0
"""Of all gates open, against the KL of an answer token, nats."""
LR = 0.04


@dataclass(frozen=True)
class Search:
    """How long gates train.

    Args:
        steps: optimiser steps.
        rows: texts of a step.
        length: T, with the fact in its first third.
    """

    steps: int = 90
    rows: int = 6
    length: int = 1024


SHORT = Search(steps=40, rows=1, length=512)
"""For a CPU: minutes with a model of 135M."""


class GatedReach(nn.Module):
    """Attention between a window and everything, one gate a key head; to its callers it is a `WindowBranch`.

    Args:
        shape: key heads and their width.
        plan: whose window and sinks a closed gate leaves.
        length: of the texts.
    """

    def __init__(self, shape: Any, plan: LayerPlan, length: int) -> None:
        super().__init__()
        sizes = (shape.n_kv_heads, shape.head_dim)
        self.near = WindowBranch(*sizes, window=plan.window, sinks=plan.sinks)
        self.whole = WindowBranch(*sizes, window=length, sinks=0)
        self.gate_G = nn.Parameter(torch.ones(shape.n_kv_heads))

    def forward(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, state: State | None, x_BTD: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Mixes whole texts: [B, H, T, K], and no state."""
        near, whole = (part(q_BHTK, k_BGTK, v_BGTK, None)[0] for part in (self.near, self.whole))
        gate_H = self.gate_G.repeat_interleave(q_BHTK.shape[1] // k_BGTK.shape[1])
        return near + gate_H[:, None, None].to(near.dtype) * (whole - near), None


def find_far_heads(
    teacher: Any, tokenizer: Any, data: TrainingData, plan: LayerPlan, count: int, *, bf16: bool, search: Search
) -> tuple[str, dict[str, float]]:
    """The key heads whose gates stay open longest.

    Args:
        teacher: in fp32, frozen.
        tokenizer: its tokenizer.
        data: its running text is where facts are hidden; its seed draws them.
        plan: whose window and sinks a closed gate leaves.
        count: heads to name.
        bf16: autocast.
        search: how long gates train.

    Returns:
        The heads as `plan.far_heads` takes them, and the gate of every head, in [0, 1].

    Raises:
        UserError: no running text, or fewer heads than asked for.
    """
    near = LayerPlan(mixer=None, window=plan.window, sinks=plan.sinks, combine="sum", window_rope=plan.window_rope)
    student = build_student(teacher, [near] * len(teacher.model.layers)).eval().requires_grad_(False)
    length = min(search.length, teacher.config.max_position_embeddings)
    gates = {index: GatedReach(layer.shape, near, length) for index, layer in student.converted().items()}
    for index, layer in student.converted().items():
        layer.add_module("window", gates[index].to(teacher.device))
    if count > (heads := sum(len(reach.gate_G) for reach in gates.values())):
        raise UserError(f"plan.far_heads={plan.far_heads} asks for more key heads than this model has, which are {heads}.")
    parameters = [reach.gate_G for reach in gates.values()]
    optimizer = torch.optim.Adam(parameters, lr=LR)
    draw, cuts = np.random.default_rng(data.seed), _cuts(data, length)
    for step in range(search.steps):
        texts = [single_fact(tokenizer, draw, length, cuts(draw, step + row)) for row in range(search.rows)]
        tokens_NT = torch.from_numpy(np.stack([ids for ids, _ in texts])).to(teacher.device)
        sizes_N = torch.tensor([size for _, size in texts], device=teacher.device)
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bf16):
            divergence = answer_divergence(student, teacher, tokens_NT, sizes_N)
        (divergence + PRICE * torch.cat([*parameters]).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter in parameters:
                parameter.clamp_(0, 1)
    found = {(index, head): value for index, reach in gates.items() for head, value in enumerate(reach.gate_G.tolist())}
    chosen: dict[int, list[int]] = {}
    for index, head in sorted(sorted(found, key=lambda place: -found[place])[:count]):
        chosen.setdefault(index, []).append(head)
    return written(chosen), {f"{index}.{head}": value for (index, head), value in found.items()}


def answer_divergence(student: Any, teacher: Any, tokens_NT: Tensor, sizes_N: Tensor) -> Tensor:
    """KL(teacher || student) a token, over the last `sizes_N` tokens of every text.

    Args:
        student: with a gradient.
        teacher: without.
        tokens_NT: texts.
        sizes_N: lengths of the answers at their ends.
    """
    longest = int(sizes_N.max())
    given = {"input_ids": tokens_NT, "use_cache": False, "logits_to_keep": longest + 1}
    log_p_NAV = student(**given).logits[:, :-1].float().log_softmax(-1)
    with torch.no_grad():
        log_q_NAV = teacher(**given).logits[:, :-1].float().log_softmax(-1)
    kl_NA = (log_q_NAV.exp() * (log_q_NAV - log_p_NAV)).sum(-1)
    is_answer_NA = torch.arange(longest, 0, -1, device=tokens_NT.device) <= sizes_N[:, None]
    return (kl_NA * is_answer_NA).sum() / sizes_N.sum()


def _cuts(data: TrainingData, length: int) -> Callable[[np.random.Generator, int], Callable[[int], np.ndarray]]:
    """Running text of the sources in turn: a function of a generator and a turn, which gives a function of a length."""
    texts = [corpus.train for corpus in data.corpora if len(corpus.train) > length]
    if not texts:
        raise UserError(f"plan.far_heads=auto hides facts in text: give a source with {length + 1} tokens of it with --data.")

    def turn(draw: np.random.Generator, number: int) -> Callable[[int], np.ndarray]:
        text = texts[number % len(texts)]

        def cut(size: int) -> np.ndarray:
            start = int(draw.integers(len(text) - size))
            return text[start : start + size]

        return cut

    return turn
