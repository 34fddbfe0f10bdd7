"""Recall beyond the window: facts at stated distances, asked for at the end, answered token by token.

Two families. `needle`: one sentence in held-out running text. `lookup`: one line of a list of names with numbers. An item is a
function of (family, distance, index), so models that share a tokenizer are compared item by item. An answer is right if every
one of its tokens is the model's first choice, which is what greedy decoding would write.

Shape legend: B items, T tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.attention import sdpa_kernel

from bench.judge.budget import WITHOUT_PLANS

SYLLABLES = ("ar", "en", "ol", "ist", "um", "ax", "eth", "yr", "ost", "im", "ul", "anc", "erd", "ov", "ish", "ent")
BEFORE = 256
"""Tokens before the fact."""


def item(tokenizer: Any, text: np.ndarray, family: str, distance: int, index: int) -> tuple[np.ndarray, int]:
    """Token ids of a prompt with its answer, and the length of the answer.

    Args:
        tokenizer: the models'.
        text: held-out token ids.
        family: needle or lookup.
        distance: tokens between the fact and the question.
        index: which item.
    """
    draw = np.random.default_rng([distance, index, family == "needle"])

    def name() -> str:
        return "".join(draw.choice(SYLLABLES, 3)).capitalize()

    def ids(line: str) -> list[int]:
        return tokenizer(line, add_special_tokens=False)["input_ids"]

    who, number = name(), str(draw.integers(10_000, 99_999))
    if family == "needle":
        start = int(draw.integers(0, len(text) - distance - BEFORE))
        haystack = text[start : start + distance + BEFORE]
        before, after = haystack[:BEFORE], haystack[BEFORE:]
        fact, question = f"\nThe secret number of {who} is {number}.\n", f"\nThe secret number of {who} is"
    else:
        lines: list[int] = []
        while len(lines) < distance + BEFORE:
            lines += ids(f"{name()}, telephone {draw.integers(10_000, 99_999)}\n")
        before, after = np.asarray(lines[:BEFORE]), np.asarray(lines[BEFORE : BEFORE + distance])
        fact, question = f"\n{who}, telephone {number}\n", f"\n{who}, telephone"
    answer = ids(f" {number}")
    return np.concatenate([before, ids(fact), after, ids(question), answer]).astype(np.int64), len(answer)


@torch.no_grad()
@sdpa_kernel(WITHOUT_PLANS)
def recall(model: Any, tokenizer: Any, text: np.ndarray, distances: list[int], n: int, batch_tokens: int) -> dict[str, list[int]]:
    """For every family and distance, whether each item was answered: lists of 0 and 1 by `family distance`."""
    found: dict[str, list[int]] = {}
    for family in ("needle", "lookup"):
        for distance in distances:
            items = [item(tokenizer, text, family, distance, index) for index in range(n)]
            right = [0] * n
            by_shape: dict[tuple[int, int], list[int]] = {}
            for index, (ids, size) in enumerate(items):
                by_shape.setdefault((len(ids), size), []).append(index)
            for (length, size), members in by_shape.items():
                for start in range(0, len(members), max(1, batch_tokens // length)):
                    part = members[start : start + max(1, batch_tokens // length)]
                    tokens = torch.from_numpy(np.stack([items[index][0] for index in part])).to(model.device)
                    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=size + 1).logits[:, :-1]
                    same = (logits.argmax(-1) == tokens[:, -size:]).all(-1).tolist()
                    for index, answered in zip(part, same, strict=True):
                        right[index] = int(answered)
            found[f"{family} {distance}"] = right
    return found
