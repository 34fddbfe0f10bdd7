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
from torch.nn import functional as F

from bench.data import DeviceCell
from bench.model import LanguageModel
from synthetic_tasks import Batch, Task, build_split

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


def summed_loss(outputs_BMX: Tensor, cell: DeviceCell, examples: Tensor) -> Tensor:
    """Cross entropy, or squared error in the mean over K, summed over the labelled rows."""
    labels_BM = cell.labels_NM[examples]
    if cell.values_NMK is None:
        return F.cross_entropy(outputs_BMX.flatten(0, 1).float(), labels_BM.flatten(), ignore_index=-100, reduction="sum")
    return _errors(outputs_BMX.float(), cell, examples)[labels_BM >= 0].sum()


def _errors(values_BMK: Tensor, cell: DeviceCell, examples: Tensor) -> Tensor:
    """Squared error of each row, [B, M]."""
    assert cell.values_NMK is not None
    return (values_BMK - cell.values_NMK[examples]).square().mean(-1)


def predictions(outputs_BMX: Tensor, cell: DeviceCell) -> Tensor:
    """Token ids [B, M], or values [B, M, K]."""
    return outputs_BMX.detach().argmax(-1) if cell.values_NMK is None else outputs_BMX.detach().float()


def row_scores(predictions_B: Tensor, cell: DeviceCell, examples: Tensor) -> Tensor:
    """Score of each row, [B, M]; 0 where there is no label."""
    labels_BM = cell.labels_NM[examples]
    if cell.values_NMK is None:
        return (predictions_B == labels_BM).float()
    scores_BM = 1 - _errors(predictions_B, cell, examples) / cell.zero_error
    return torch.where(labels_BM >= 0, scores_BM, 0.0)


def example_scores(scores_BM: Tensor, cell: DeviceCell, examples: Tensor) -> Tensor:
    """Mean score over an example's labelled rows, [B]."""
    return scores_BM.sum(1) / (cell.labels_NM[examples] >= 0).sum(1)


def forward(model: LanguageModel, cell: DeviceCell, examples: Tensor, precision: str) -> Tensor:
    """The model's outputs at the labelled rows, [B, M, X]."""
    with torch.autocast(cell.inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(cell.inputs[examples], cell.rows_NM[examples])


def evaluate(model: LanguageModel, cells: list[DeviceCell], precision: str) -> Scores:
    """Scores on a split; accuracy is the mean over examples of the accuracy over an example's labelled rows."""
    scores = Scores()
    for cell in cells:
        _score_cell(scores, cell, model, precision)
    return scores


def evaluate_test(model: LanguageModel, task: Task, seed: int, device: torch.device, precision: str) -> Scores:
    """Scores on the test split, with the metrics that only the task can define."""
    scores = Scores()
    batches = build_split(task, "test", seed)
    for cell in task.cells("test"):
        batch = batches[cell.name]
        on_device = DeviceCell.from_batch(cell, batch, device, votes_NT=task.votes(batch))
        predicted = _score_cell(scores, on_device, model, precision)
        found = task.extra_metrics(cell, batch, _placed(predicted.cpu().numpy(), batch))
        scores.extra |= {(name, cell.name): value for name, value in found.items() if math.isfinite(value)}
    return scores


def _placed(predicted: np.ndarray, batch: Batch) -> np.ndarray:
    """Predictions of the labelled rows at their positions, as `Task.solve` gives them: [N, T] or [N, T, K]."""
    placed = np.zeros((*batch.mask.shape, *predicted.shape[2:]), dtype=np.int32 if predicted.ndim == 2 else np.float32)
    counts = batch.mask.sum(axis=1)
    placed[batch.mask] = predicted[np.arange(predicted.shape[1]) < counts[:, None]]
    return placed


@torch.no_grad()
def _score_cell(scores: Scores, cell: DeviceCell, model: LanguageModel, precision: str) -> Tensor:
    """Adds the scores of a cell; its predictions, [N, M] or [N, M, K]."""
    model.eval()
    losses, predicted, votes = [], [], []
    everyone = torch.arange(len(cell), device=cell.inputs.device)
    for part in everyone.split(max(1, EVAL_TOKENS // cell.cell.length)):
        outputs_BMX = forward(model, cell, part, precision)
        losses.append(summed_loss(outputs_BMX, cell, part))
        predicted.append(predictions(outputs_BMX, cell))
        if cell.votes_NM is not None:
            votes.append(_vote_accuracy(outputs_BMX, cell.votes_NM[part], cell.labels_NM[part]))
    found = torch.cat(predicted)
    scores_NM = row_scores(found, cell, everyone)
    name, labelled = cell.cell.name, int((cell.labels_NM >= 0).sum())
    _add_means(scores, cell, scores_NM.double(), float(torch.stack(losses).sum() / labelled))
    for lure, wrong_NM in cell.lures.items():
        present_NM = wrong_NM >= 0
        if present_NM.any():
            scores.lures[lure, name] = float((found == wrong_NM)[present_NM].double().mean())
    if votes:
        scores.extra["symbol accuracy", name] = float(torch.cat(votes).double().mean())
    return found


def _add_means(scores: Scores, cell: DeviceCell, scores_NM: Tensor, loss: float) -> None:
    name, n = cell.cell.name, len(cell)
    score_N = example_scores(scores_NM, cell, torch.arange(n, device=scores_NM.device))
    scores.accuracy[name] = max(0.0, float(score_N.mean()))
    scores.stderr[name] = float(score_N.std() / math.sqrt(n)) if n > 1 else 0.0
    scores.loss[name], scores.examples[name] = loss, n
    if cell.values_NMK is not None:
        scores.extra["mse", name] = loss
    for group, rows_NM in cell.groups.items():
        if rows_NM.any():
            scores.groups[f"{name}/{group}"] = max(0.0, float(scores_NM[rows_NM].mean()))


def _vote_accuracy(logits_BMV: Tensor, votes_BM: Tensor, labels_BM: Tensor) -> Tensor:
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
