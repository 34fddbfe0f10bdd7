"""Which key heads of a teacher recall from afar, measured without training.

Facts in running text are asked for at its end. One head at a time sees the plan's window and sinks only, all others
everything; what that costs the answer's log-probability ranks the heads.

Shape legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.convert.data import TrainingData
from bench.convert.far import UnevenWindow, written
from bench.convert.rendered import single_fact
from bench.convert.spec import LayerPlan
from bench.convert.student import build_student
from bench.errors import UserError

LENGTH = 1024
"""Tokens of a text with a fact in its first third."""
ASKED = 48
"""Facts that are asked for; the half that the teacher answers best is used, because what it cannot recall ranks nothing."""
ROWS = 16
"""Texts of a forward pass."""


def find_far_heads(
    teacher: Any, tokenizer: Any, data: TrainingData, plan: LayerPlan, count: int, *, bf16: bool, asked: int = ASKED
) -> tuple[str, dict[str, float]]:
    """The key heads whose sight costs recall most.

    Args:
        teacher: in fp32.
        tokenizer: its tokenizer.
        data: its running text is where facts are hidden; its seed draws them.
        plan: whose window and sinks a head is cut to.
        count: heads to name.
        bf16: autocast.
        asked: facts asked for.

    Returns:
        The heads as `plan.far_heads` takes them, and what each head of the teacher costs, in nats an answer.

    Raises:
        UserError: no running text, or fewer heads than asked for.
    """
    length = min(LENGTH, teacher.config.max_position_embeddings)
    whole = plan.model_copy(update={"mixer": None, "options": {}, "combine": "sum", "projections": "share", "groups": "repeat"})
    whole = whole.model_copy(update={"far_heads": "", "far_window": 0, "window": length, "sinks": 0})
    student = build_student(teacher, [whole] * len(teacher.model.layers)).eval()
    facts = _hidden_facts(tokenizer, data, length, asked, teacher.device)
    with torch.no_grad(), torch.autocast(teacher.device.type, torch.bfloat16, enabled=bf16):
        return _cut_each(student, facts, plan, count, length)


def _cut_each(student: Any, facts: Facts, plan: LayerPlan, count: int, length: int) -> tuple[str, dict[str, float]]:
    """Cuts one head of the student after the other, which sees everything until then."""
    known = facts.answers(student)
    best = known.argsort(descending=True)[: (len(known) + 1) // 2]
    facts, known = Facts(facts.tokens_NT[best], facts.sizes_N[best]), known[best]
    cost: dict[tuple[int, int], float] = {}
    for index, layer in student.converted().items():
        n_heads, whole = layer.shape.n_kv_heads, layer.window
        for head in range(n_heads):
            others = [other for other in range(n_heads) if other != head]
            sizes = {"window": plan.window, "far_window": length, "sinks": plan.sinks}
            layer.window = UnevenWindow(others, n_heads, layer.head_dim, **sizes)
            cost[index, head] = float((known - facts.answers(student)).mean())
        layer.window = whole
    if count > len(cost):
        raise UserError(f"plan.far_heads={plan.far_heads} asks for more key heads than the {len(cost)} that there are.")
    chosen: dict[int, list[int]] = {}
    for index, head in sorted(sorted(cost, key=lambda place: -cost[place])[:count]):
        chosen.setdefault(index, []).append(head)
    return written(chosen), {f"{index}.{head}": value for (index, head), value in cost.items()}


@dataclass(frozen=True)
class Facts:
    """Texts with one fact and the question for it.

    Args:
        tokens_NT: the texts.
        sizes_N: how many of the last tokens of each are the answer.
    """

    tokens_NT: Tensor
    sizes_N: Tensor

    def answers(self, model: Any) -> Tensor:
        """The log-probability [N] that a model gives every answer."""
        longest = int(self.sizes_N.max())
        found = []
        for tokens_NT, sizes_N in zip(self.tokens_NT.split(ROWS), self.sizes_N.split(ROWS), strict=True):
            logits_NTV = model(input_ids=tokens_NT, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
            last_NT = tokens_NT[:, -longest:]
            log_p_NT = logits_NTV.float().log_softmax(-1).gather(2, last_NT[..., None])[..., 0]
            is_answer_NT = torch.arange(longest, 0, -1, device=last_NT.device) <= sizes_N[:, None]
            found.append((log_p_NT * is_answer_NT).sum(1))
        return torch.cat(found)


def _hidden_facts(tokenizer: Any, data: TrainingData, length: int, asked: int, device: torch.device) -> Facts:
    draw = np.random.default_rng(data.seed)
    texts = [corpus.train for corpus in data.corpora if len(corpus.train) > length]
    if not texts:
        raise UserError(f"plan.far_heads=auto hides facts in text: give a source with {length + 1} tokens of it with --data.")

    def cut_from(text: np.ndarray) -> Callable[[int], np.ndarray]:
        def cut(size: int) -> np.ndarray:
            start = int(draw.integers(len(text) - size))
            return text[start : start + size]

        return cut

    drawn = [single_fact(tokenizer, draw, length, cut_from(texts[index % len(texts)])) for index in range(asked)]
    tokens_NT = torch.from_numpy(np.stack([ids for ids, _ in drawn])).to(device)
    return Facts(tokens_NT, torch.tensor([size for _, size in drawn], device=device))
