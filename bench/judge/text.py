"""Held-out text: its tokens, and how close a model's distributions are to its teacher's on it, sequence by sequence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.convert.data import HELD_OUT, check_sources
from bench.convert.measure import agreement_by_row
from bench.convert.resolve import parse_source
from bench.convert.spec import Source
from bench.convert.texts import documents
from bench.errors import UserError
from bench.judge import packaged
from bench.records import EvalMetric

DOCSTRINGS = "docstrings"
"""The text that is scored unless another is named: no source of `bench convert` contains it."""


def held_out_tokens(source: str, tokenizer: Any, rows: int, length: int) -> Tensor:
    """Tokens [rows, length] that no training of `bench convert` on the same source has seen.

    Args:
        source: `docstrings`, or a text source as `bench convert --data` writes it, of which the end is taken: its last 5 % are
            never trained on.
        tokenizer: of the model.
        rows: sequences.
        length: tokens of each.

    Raises:
        UserError: an unknown source, or not enough text.
    """
    needed = rows * length
    if source == DOCSTRINGS:
        found = list(itertools.islice(_tokens(packaged.docstrings(), tokenizer), needed))
    else:
        tokens = np.fromiter(_tokens(documents(running_text(source)), tokenizer), dtype=np.int64)
        found = tokens[len(tokens) - min(needed, int(len(tokens) * HELD_OUT)) :].tolist()
    whole = len(found) // length
    if whole == 0:
        raise UserError(f"--text {source} has {len(found):,} held-out tokens; a sequence takes {length:,}. Give more text.")
    return torch.tensor(found[: whole * length]).view(whole, length)


def running_text(source: str) -> Source:
    """A source as `bench convert --data` writes it, if it is one of running text.

    Raises:
        UserError: another kind of source, or a file or folder that is not there.
    """
    parsed = parse_source(source)
    if parsed.kind not in ("text", "dataset", "packages"):
        raise UserError(f"--text {source!r} is no running text; give text:PATH, dataset:NAME, packages or {DOCSTRINGS}.")
    check_sources([parsed])
    return parsed


def _tokens(texts: Iterator[str], tokenizer: Any) -> Iterator[int]:
    for text in texts:
        yield from tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        yield tokenizer.eos_token_id


def teacher_agreement(model: Any, teacher: Any, tokens_BT: Tensor) -> tuple[list[EvalMetric], list[dict[str, Any]]]:
    """KL per token, share of equal first choices and perplexity, with one row of items a sequence.

    Args:
        model: any causal language model.
        teacher: another with the same vocabulary; the model itself where there is none.
        tokens_BT: held-out text.

    Returns:
        The metrics, and a value of each for each sequence; perplexity there as nats per token.
    """
    values = agreement_by_row(model, teacher, tokens_BT)
    del values["teacher_nll"]
    means = {name: fmean(found) for name, found in values.items()}
    errors = {name: stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None for name, found in values.items()}
    n = len(tokens_BT)
    metrics = [
        EvalMetric(name=name, value=means[name], stderr=errors[name], n=n, higher_is_better=name == "top1") for name in values
    ]
    error = None if errors["nll"] is None else math.exp(means["nll"]) * errors["nll"]
    metrics.append(EvalMetric(name="ppl", value=math.exp(means["nll"]), stderr=error, n=n, higher_is_better=False))
    items = [
        {"item": str(index), "filter": "none", "length": 0, "given": "", "wanted": "", "metric": name, "value": value}
        for name, found in values.items()
        for index, value in enumerate(found)
    ]
    return metrics, items
