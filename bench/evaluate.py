"""Losses and scores: how good predictions are, by example, by cell and by named subset.

A row's score is 1 or 0 where labels are tokens. Where they are real it is the share of the squared error of predicting zero
that a prediction removes; means of it are cut off at 0, so that for both kinds 1 is perfect and "accuracy" names their mean.
Shape legend: B batch, N examples, T time, M labelled rows of an example, V vocabulary, K values, X either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bench.data import DeviceCell
from kernels.cross_entropy import labelled_cross_entropy
from synthetic_tasks import Batch, Cell, Task

EVAL_TOKENS = 1 << 16
"""Tokens per evaluation batch."""


@dataclass
class Scores:
    """Accuracy and loss of a split by cell, group rates by "<cell>/<group>", lure rates and other metrics by (name, cell)."""

    accuracy: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    stderr: dict[str, float] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    groups: dict[str, float] = field(default_factory=dict)
    lures: dict[tuple[str, str], float] = field(default_factory=dict)
    extra: dict[tuple[str, str], float] = field(default_factory=dict)

    def mean(self, what: dict[str, float]) -> float:
        """Equal mean over the cells."""
        return float(np.mean(list(what.values())))


def loss_and_predictions(outputs_BMX: Tensor, labels_BM: Tensor, values_BMK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss summed over the labelled rows, and what the outputs predict.

    Args:
        outputs_BMX: logits of tokens, or values.
        labels_BM: -100 where there is no label.
        values_BMK: real-valued labels, None where labels are tokens.

    Returns:
        Cross entropy, or squared error in the mean over K; and token ids [B, M], or values [B, M, K].
    """
    if values_BMK is None:
        loss_R, predicted_R = labelled_cross_entropy(outputs_BMX.flatten(0, 1), labels_BM.flatten())
        return loss_R.sum(), predicted_R.view(labels_BM.shape)
    values = outputs_BMX.float()
    errors_BM = (values - values_BMK).square().mean(-1)
    return torch.where(labels_BM >= 0, errors_BM, 0.0).sum(), values.detach()


def row_scores(predicted: Tensor, labels_BM: Tensor, values_BMK: Tensor | None = None, zero_error: Tensor | float = 1.0) -> Tensor:
    """Score of each row, [B, M]; 0 where there is no label.

    Args:
        predicted: from `loss_and_predictions`.
        labels_BM: -100 where there is no label.
        values_BMK: real-valued labels, None where labels are tokens.
        zero_error: mean squared error of predicting zero.
    """
    if values_BMK is None:
        return (predicted == labels_BM).float()
    scores_BM = 1 - (predicted - values_BMK).square().mean(-1) / zero_error
    return torch.where(labels_BM >= 0, scores_BM, 0.0)


def example_scores(scores_BM: Tensor, labels_BM: Tensor) -> Tensor:
    """Mean score over an example's labelled rows, [B]; 0 for an example that has none."""
    return scores_BM.sum(-1) / (labels_BM >= 0).sum(-1).clamp(min=1)


@dataclass
class CellOutputs:
    """What a model made of a cell, on the device.

    Args:
        loss: summed over the labelled rows, one number.
        predicted: [N, M] token ids or [N, M, K] values.
        votes_N: accuracy over each example's votes, where the task has votes.
    """

    loss: Tensor
    predicted: Tensor
    votes_N: Tensor | None = None


def placed(predicted: np.ndarray, batch: Batch) -> np.ndarray:
    """Predictions of the labelled rows at their positions, as `Task.solve` gives them: [N, T] or [N, T, K]."""
    found = np.zeros((*batch.mask.shape, *predicted.shape[2:]), dtype=np.int32 if predicted.ndim == 2 else np.float32)
    counts = batch.mask.sum(axis=1)
    found[batch.mask] = predicted[np.arange(predicted.shape[1]) < counts[:, None]]
    return found


def measure(cell: DeviceCell, outputs: CellOutputs) -> Tensor:
    """What `add_scores` reads of a cell, in double on its device, which is not waited for.

    Summed loss; mean and deviation over examples of the mean score of an example's labelled rows; mean score of each group;
    rate of each lure; mean over examples of the accuracy over votes, where there are votes.
    """
    found, real = outputs.predicted, cell.values_NMK is not None
    scores_NM = row_scores(found, cell.labels_NM, cell.values_NMK, cell.zero_error if real else 1.0).double()
    score_N = example_scores(scores_NM, cell.labels_NM)
    values = [outputs.loss.double(), score_N.mean(), score_N.std() if len(cell) > 1 else torch.zeros_like(score_N[0])]
    values += [_mean_of(scores_NM, rows_NM) for rows_NM in cell.groups.values()]
    values += [_mean_of((found == wrong_NM).double(), wrong_NM >= 0) for wrong_NM in cell.lures.values()]
    if outputs.votes_N is not None:
        values.append(outputs.votes_N.double().mean())
    return torch.stack(values)


def _mean_of(scores_NM: Tensor, rows_NM: Tensor) -> Tensor:
    return torch.where(rows_NM, scores_NM, 0.0).sum() / rows_NM.sum()


def add_scores(scores: Scores, cell: DeviceCell, measured: list[float]) -> None:
    """Adds the scores of a cell, from what `measure` found."""
    name, n = cell.cell.name, len(cell)
    loss, accuracy, deviation, *more = measured
    rest = iter(more)
    scores.accuracy[name], scores.stderr[name] = max(0.0, accuracy), deviation / math.sqrt(n)
    scores.loss[name], scores.examples[name] = loss / cell.labelled, n
    if cell.values_NMK is not None:
        scores.extra["mse", name] = scores.loss[name]
    for group in cell.groups:
        scores.groups[f"{name}/{group}"] = max(0.0, next(rest))
    for lure in cell.lures:
        scores.lures[lure, name] = next(rest)
    if cell.votes_NM is not None:
        scores.extra["symbol accuracy", name] = next(rest)


def add_extra(scores: Scores, task: Task, cell: Cell, batch: Batch, predicted: Tensor) -> None:
    """Adds the metrics that only the task can define."""
    found = task.extra_metrics(cell, batch, placed(predicted.cpu().numpy(), batch))
    scores.extra |= {(name, cell.name): value for name, value in found.items() if math.isfinite(value)}


def vote_accuracy(logits_BMV: Tensor, votes_BM: Tensor, labels_BM: Tensor) -> Tensor:
    """Accuracy over votes of each example, [B]: the probabilities of the rows of a vote are summed before the best is taken.

    A vote's label is that of its first row.
    """
    rows, most = votes_BM.shape
    flat_BM = votes_BM + most * torch.arange(rows, device=votes_BM.device)[:, None]
    probabilities_BMV = torch.where((labels_BM >= 0)[..., None], logits_BMV.float().softmax(-1), 0.0)
    pooled = torch.zeros(rows * most, logits_BMV.shape[-1], device=logits_BMV.device)
    pooled.index_add_(0, flat_BM.flatten(), probabilities_BMV.flatten(0, 1))
    first_BM = labels_BM >= 0
    first_BM[:, 1:] &= votes_BM[:, 1:] != votes_BM[:, :-1]
    hits_BM = (pooled.argmax(-1)[flat_BM] == labels_BM) & first_BM
    return hits_BM.sum(1) / first_BM.sum(1)
