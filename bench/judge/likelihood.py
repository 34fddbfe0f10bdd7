"""Log-likelihoods of continuations, many at a time: what the loop of lm-eval's own wrapper asks of the device item by item.

Without a cache, so that a converted model runs its parallel form and stores no state; with logits from the first scored
position on alone; and with one answer from the device a batch, because every wait for a busy device costs its whole queue.

Shape legend: B rows, T input tokens, K kept positions, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Continuation:
    """One request.

    Args:
        inputs: tokens that the model reads: context and continuation without its last token.
        targets: the continuation, which the last positions of `inputs` predict.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def continuation(context: Sequence[int], targets: Sequence[int], max_length: int) -> Continuation:
    """A request whose context loses its beginning where both are longer than the model reads, as everywhere in lm-eval.

    Args:
        context: at least one token.
        targets: at least one and at most `max_length`.
        max_length: tokens that the model reads.
    """
    assert context and 0 < len(targets) <= max_length
    return Continuation((*context, *targets)[-(max_length + 1) : -1], tuple(targets))


def log_likelihoods(
    model: Any, requests: Sequence[Continuation], rows: Callable[[int], int], dtype: torch.dtype | None
) -> list[tuple[float, bool]]:
    """The log-probability of every continuation, and whether greedy decoding would write it.

    Args:
        model: any causal language model of transformers.
        requests: in any order; equal inputs, as of answers of one letter each, are read once.
        rows: of a batch whose longest row has so many tokens.
        dtype: of the softmax; None for that of the logits.
    """
    scored_by_inputs: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        scored_by_inputs.setdefault(request.inputs, []).append(index)
    distinct = sorted(scored_by_inputs, key=len, reverse=True)  # a batch too large shows at once
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    start = 0
    while start < len(distinct):
        batch = distinct[start : start + max(1, rows(len(distinct[start])))]
        start += len(batch)
        asked = [(row, index) for row, inputs in enumerate(batch) for index in scored_by_inputs[inputs]]
        answers = _batch(model, batch, [(row, requests[index].targets) for row, index in asked], dtype)
        for (_, index), answer in zip(asked, answers, strict=True):
            found[index] = answer
    return found


@torch.no_grad()
def _batch(
    model: Any, inputs: list[tuple[int, ...]], asked: list[tuple[int, tuple[int, ...]]], dtype: torch.dtype | None
) -> list[tuple[float, bool]]:
    """One forward pass; `asked` has a row of `inputs` and its targets for each answer."""
    longest = len(inputs[0])
    first = min(len(inputs[row]) - len(targets) for row, targets in asked)
    tokens_BT = torch.tensor([(*row, *[0] * (longest - len(row))) for row in inputs], device=model.device)
    logits_BKV = _last_logits(model, tokens_BT, longest - first)
    spans = [(row, len(inputs[row]) - len(targets), len(targets)) for row, targets in asked]
    row_N = [row for row, _, size in spans for _ in range(size)]
    position_N = [at - first for _, start, size in spans for at in range(start, start + size)]
    targets_N = [token for _, targets in asked for token in targets]
    where = torch.tensor([row_N, position_N, targets_N], device=model.device)
    scored_NV = logits_BKV[where[0], where[1]].to(dtype or logits_BKV.dtype)
    told = torch.stack((-F.cross_entropy(scored_NV, where[2], reduction="none"), scored_NV.argmax(-1) == where[2])).double().cpu()
    sizes = [size for _, _, size in spans]
    return [(float(log_p.sum()), bool(same.all())) for log_p, same in zip(*(part.split(sizes) for part in told), strict=True)]


def _last_logits(model: Any, tokens_BT: Tensor, keep: int) -> Tensor:
    """Logits of the last `keep` positions, [B, keep, V]; a model that cannot leave the others out makes them all."""
    only_last = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=tokens_BT, use_cache=False, **only_last).logits[:, -keep:]
