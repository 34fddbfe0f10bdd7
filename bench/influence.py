"""Influence maps: how much does each input token move each output of a trained model?

The map works for every mixer without code of its own: row t, column s holds the Frobenius norm of d h_t / d x_s, with x
the embeddings and h the normalised last hidden state, estimated with random sign probes (Hutchinson): for v of random
signs, E ||v^T J||^2 = ||J||_F^2.
"""

from __future__ import annotations

import numpy as np
import torch

from bench.model import LanguageModel
from synthetic_tasks import Batch, stream

PROBES = 8
MAX_LENGTH = 128


def influence_map(model: LanguageModel, batch: Batch, device: torch.device, *, links: bool = True) -> dict[str, np.ndarray] | None:
    """The influence map on the first example of a batch, with its key-to-query links.

    Args:
        model: the trained model.
        batch: examples of its task.
        device: where the model is.
        links: whether answers are tokens that stand in the input before; otherwise no link is drawn.

    Returns:
        `map` [T, T] float32 (row = output position), `tokens` [T], and for each labelled row its `query_positions`, the
        `value_positions` where its answer stood before, and the `key_positions` before them, -1 where there is none;
        None if the example is longer than 128 tokens.
    """
    tokens, mask, targets = batch.inputs[0], batch.mask[0], batch.targets[0]
    length = len(tokens)
    if length > MAX_LENGTH:
        return None
    squared = np.zeros((length, length))
    rng = stream(0, "influence")
    model.eval()
    read = torch.from_numpy(tokens.astype(np.int64) if batch.features is None else batch.features[0]).to(device)
    inputs = read.expand(length, *read.shape)
    diagonal = torch.arange(length, device=device)
    for _ in range(PROBES):
        with torch.no_grad():
            x_TTD = model.embed(inputs)
        x_TTD.requires_grad_(True)
        h_TTD = model.norm(model.hidden(x_TTD))
        signs_D = torch.from_numpy(rng.choice([-1.0, 1.0], size=h_TTD.shape[-1])).to(h_TTD)
        (gradient_TTD,) = torch.autograd.grad((h_TTD[diagonal, diagonal] * signs_D).sum(), x_TTD)
        squared += gradient_TTD.double().square().sum(-1).cpu().numpy()
    queries = np.flatnonzero(mask)
    values = np.array([_last_before(tokens, query, targets[query]) if links else -1 for query in queries.tolist()])
    return {
        "map": np.sqrt(squared / PROBES).astype(np.float32),
        "tokens": tokens,
        "query_positions": queries,
        "value_positions": values,
        "key_positions": np.where(values > 0, values - 1, -1),
    }


def _last_before(tokens: np.ndarray, end: int, token: int) -> int:
    """Last position before `end` that holds `token`, or -1."""
    found = np.flatnonzero(tokens[:end] == token)
    return int(found[-1]) if len(found) else -1
