"""Recall tasks rendered as training text: what stands far back must be known again.

Three kinds. `lists` of pairs and questions about them in another order; `facts` scattered over running text and asked for at
its end; and `passages` of running text that come back later. Without running text all are lists.

Shape legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SYLLABLES = [consonant + vowel for consonant in "bdfklmnprstvz" for vowel in "aeio"]
FORMS = (
    ("{k} has the number {v}.", "What number does {k} have? {v}."),
    ("{k}: {v}", "{k}: {v}"),
    ("The code of {k} is {v}.", "The code of {k} is {v}."),
    ("{v} belongs to {k}.", "What belongs to {k}? {v}."),
)
FILLER = (
    "The road went on through the hills and nobody spoke.",
    "It rained in the morning and cleared up later in the day.",
    "There was little to do but wait for the evening train.",
    "A door opened somewhere and closed again.",
)
KINDS = ("lists", "facts", "passages")
MAX_PAIRS = 64
MAX_FACTS = 24
Text = Callable[[int], np.ndarray]
"""Gives that many consecutive tokens of running text."""


def render_recall(tokenizer: Any, draw: np.random.Generator, length: int, text: Text | None = None, kind: str = "") -> np.ndarray:
    """One sequence of exactly `length` tokens.

    Args:
        tokenizer: the teacher's.
        draw: source of randomness.
        length: T.
        text: running text, or None.
        kind: one of `KINDS`; empty for any.

    Returns:
        [T] int64.
    """
    kind = kind or KINDS[draw.integers(len(KINDS))]
    if kind == "facts" and text is not None:
        return _scattered(tokenizer, draw, length, text)
    if kind == "passages" and text is not None:
        return _repeated(draw, length, text)
    ids: list[int] = []
    while len(ids) < length:
        ids += _fitting(tokenizer, draw, length - len(ids))
    return np.asarray(ids[:length], dtype=np.int64)


def single_fact(tokenizer: Any, draw: np.random.Generator, length: int, text: Text) -> tuple[np.ndarray, int]:
    """Running text with one fact in its first third, the question for it and the answer.

    Args:
        tokenizer: the teacher's.
        draw: source of randomness.
        length: T.
        text: running text.

    Returns:
        [T] int64, and how many of the last tokens are the answer.
    """
    statement, question = FORMS[draw.integers(len(FORMS))]
    ((name, value),) = _pairs(draw, 1).items()
    asked = "\n" + question.partition("{v}")[0].rstrip().format(k=name)
    lines = (f"\n{statement.format(k=name, v=value)}\n", asked, f" {value}")
    fact, prompt, answer = tokenizer(list(lines), add_special_tokens=False)["input_ids"]
    room = max(0, length - len(fact) - len(prompt) - len(answer))
    before, after = np.split(text(room), [int(draw.integers(room // 3 + 1))])
    return np.concatenate([before, fact, after, prompt, answer]).astype(np.int64)[-length:], len(answer)


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
    pairs = _pairs(draw, n_pairs)
    lines = [statement.format(k=name, v=value) for name, value in pairs.items()]
    lines += list(draw.choice(FILLER, draw.integers(0, n_pairs + 1)))
    lines += [question.format(k=name, v=pairs[name]) for name in _shuffled(draw, list(pairs))]
    return "\n".join(lines) + "\n\n"


def _scattered(tokenizer: Any, draw: np.random.Generator, length: int, text: Text) -> np.ndarray:
    """Running text in which facts stand at random places, then a question for each of them; a list if not one fits."""
    statement, question = FORMS[draw.integers(len(FORMS))]
    n_facts = int(draw.integers(1, MAX_FACTS + 1))
    while True:
        pairs = _pairs(draw, n_facts)
        told = [statement.format(k=name, v=value) for name, value in pairs.items()]
        asked = [question.format(k=name, v=pairs[name]) for name in _shuffled(draw, list(pairs))]
        facts = tokenizer([f"\n{line}\n" for line in told], add_special_tokens=False)["input_ids"]
        questions = tokenizer("\n" + "\n".join(asked) + "\n", add_special_tokens=False)["input_ids"]
        room = length - len(questions) - sum(map(len, facts))
        if room >= length // 2:
            break
        if n_facts == 1:
            return render_recall(tokenizer, draw, length, kind="lists")
        n_facts //= 2
    places = np.sort(draw.integers(0, room, len(facts)))
    pieces = np.split(text(room), places)
    told_between = [part for piece, fact in zip(pieces, facts, strict=False) for part in (piece, fact)]
    return np.concatenate([*told_between, pieces[-1], questions]).astype(np.int64)


def _repeated(draw: np.random.Generator, length: int, text: Text) -> np.ndarray:
    """Running text whose first half lends passages to the second."""
    ids = text(length).astype(np.int64)
    size = int(draw.integers(length // 16, length // 4))
    source = int(draw.integers(0, length // 2 - size + 1))
    target = int(draw.integers(length // 2, length - size + 1))
    ids[target : target + size] = ids[source : source + size]
    return ids


def _pairs(draw: np.random.Generator, count: int) -> dict[str, str]:
    names = ["".join(draw.choice(SYLLABLES, 3)).capitalize() for _ in range(count)]
    return {name: str(draw.integers(10 ** (digits := int(draw.integers(2, 6))), 10 ** (digits + 1))) for name in names}


def _shuffled(draw: np.random.Generator, names: list[str]) -> list[str]:
    return [names[index] for index in draw.permutation(len(names))]
