"""The two ends of the model, chosen by the task: what reads its inputs, and what turns hidden vectors into predictions.

Shape legend: B batch, T time, D width, M labelled rows, F features, V vocabulary, K values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthetic_tasks import Task


def reader(task: Task, d_model: int) -> nn.Module:
    """What reads the inputs: an embedding of token ids, or a linear map of features, to [B, T, D]."""
    if task.input_kind == "features":
        return nn.Linear(task.feature_dim, d_model)
    return nn.Embedding(task.vocab_size, d_model)


def computed(x: Tensor) -> Tensor:
    """A tensor in the dtype that autocast computes in: a table's rows come in fp32, and would keep the whole stream there."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def head(task: Task, d_model: int) -> nn.Module | None:
    """What predicts from normalised hidden vectors; None stands for the embedding's transpose.

    Only tokens in and tokens out can share a table. With `readout = "last"` it is a `LastDecoder`.
    """
    outputs = task.value_dim if task.target_kind == "real" else task.vocab_size
    if task.readout == "last":
        return LastDecoder(d_model, outputs, task.max_length())
    if task.input_kind == "tokens" and task.target_kind == "tokens":
        return None
    return nn.Linear(d_model, outputs)


class LastDecoder(nn.Module):
    """Decodes every label from the last position alone: a two-layer MLP on its hidden vector plus a code of the label's place.

    The same for every mixer, so that what differs is what the mixer packed into that one vector (MAD's compression task).

    Args:
        d_model: width D of the hidden vector and of the hidden layer.
        outputs: V or K.
        max_len: number of places.
    """

    def __init__(self, d_model: int, outputs: int, max_len: int) -> None:
        super().__init__()
        self.places = nn.Embedding(max_len, d_model)
        self.up = nn.Linear(d_model, d_model)
        self.down = nn.Linear(d_model, outputs)

    def forward(self, h_BD: Tensor, rows_BM: Tensor) -> Tensor:
        """Predictions [B, M, V or K] for labels at `rows_BM`."""
        return self.down(F.gelu(self.up(h_BD[:, None] + self.places(rows_BM))))


def initialise(module: nn.Module | None) -> None:
    """Embedding tables start from N(0, 0.02), as the tied head needs; linear readers keep PyTorch's initialisation."""
    if isinstance(module, nn.Embedding):
        with torch.no_grad():
            module.weight.normal_(std=0.02)
