"""Recall tasks rendered as text: lists of pairs, some prose-like filler, and questions whose answers stand far back."""

from __future__ import annotations

from typing import Any

import numpy as np

SYLLABLES = [consonant + vowel for consonant in "bdfklmnprstvz" for vowel in "aeio"]
FORMS = (
    ("{k} has the number {v}.", "What number does {k} have? {v}."),
    ("{k}: {v}", "{k}: {v}"),
    ("The code of {k} is {v}.", "The code of {k} is {v}."),
)
FILLER = (
    "The road went on through the hills and nobody spoke.",
    "It rained in the morning and cleared up later in the day.",
    "There was little to do but wait for the evening train.",
    "A door opened somewhere and closed again.",
)
MAX_PAIRS = 64


def render_recall(tokenizer: Any, draw: np.random.Generator, length: int) -> np.ndarray:
    """One sequence of exactly `length` tokens: pairs, filler, and all pairs asked again in another order.

    Args:
        tokenizer: the teacher's.
        draw: source of randomness.
        length: T.

    Returns:
        [T] int64.
    """
    ids: list[int] = []
    while len(ids) < length:
        ids += _fitting(tokenizer, draw, length - len(ids))
    return np.asarray(ids[:length], dtype=np.int64)


def _fitting(tokenizer: Any, draw: np.random.Generator, room: int) -> list[int]:
    """Tokens of one list with its questions, with as many pairs as the room allows, or of two pairs if none fits."""
    n_pairs = int(draw.integers(2, MAX_PAIRS + 1))
    while True:
        ids = tokenizer(_example(draw, n_pairs), add_special_tokens=False)["input_ids"]
        if len(ids) <= room or n_pairs == 2:
            return ids
        n_pairs = max(2, n_pairs // 2)


def _example(draw: np.random.Generator, n_pairs: int) -> str:
    """One list, some filler, and a question for every pair in another order."""
    statement, question = FORMS[draw.integers(len(FORMS))]
    names = ["".join(draw.choice(SYLLABLES, 3)).capitalize() for _ in range(n_pairs)]
    pairs = {name: str(draw.integers(1000, 9999)) for name in names}
    lines = [statement.format(k=name, v=value) for name, value in pairs.items()]
    lines += list(draw.choice(FILLER, draw.integers(0, n_pairs + 1)))
    asked = [list(pairs)[index] for index in draw.permutation(len(pairs))]
    lines += [question.format(k=name, v=pairs[name]) for name in asked]
    return "\n".join(lines) + "\n\n"
