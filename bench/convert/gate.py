"""The checkpoint gate: a converted model is one function, however it is called.

parallel = chunked = step by step = left-padded = batched = reloaded, as log-probabilities in fp32.

Shape legend: B batch, T time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 2e-3
"""Largest difference of a log-probability, in nats, in fp32 over all layers."""
LARGEST_TOLERANCE = 5e-2
"""A model that rounding alone moves by more than this computes nothing that could be checked."""
ROUNDING = 1e-6
"""Relative change of the embeddings that stands for the rounding of a layer's sums in another order."""
STEPS = 24
"""Tokens that are decoded one by one."""


@dataclass(frozen=True)
class GateResult:
    """Largest differences of log-probabilities by form, in nats."""

    errors: dict[str, float]
    tolerance: float = TOLERANCE
    rounding: float = 0.0
    """How far a change of the embeddings by `ROUNDING` moves log-probabilities: a badly trained model amplifies rounding."""

    @property
    def passed(self) -> bool:
        """Whether every form is within the tolerance; NaN is not."""
        return all(error <= self.tolerance for error in self.errors.values())

    def sentence(self) -> str:
        """All differences in one line."""
        found = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        verdict = "passed" if self.passed else "FAILED"
        return f"Checkpoint gate {verdict} (largest log-probability difference, allowed {self.tolerance:.2g}): {found}."


@torch.no_grad()
def check_model(model: Any, tokens_BT: Tensor, *, folder: Path | None = None) -> GateResult:
    """Compares every way of calling a model with its parallel forward pass.

    Args:
        model: in fp32 and evaluation mode.
        tokens_BT: int64, at least two rows of at least 2 `STEPS` tokens.
        folder: the saved model, which is loaded again; None leaves that out.
    """
    tokens_BT = tokens_BT.to(model.device)
    parallel = log_probs(model, tokens_BT)
    errors = {
        "chunked": _difference(_in_pieces(model, tokens_BT, _odd_pieces(tokens_BT.shape[1])), parallel),
        "step": _difference(_in_pieces(model, tokens_BT, _then_steps(tokens_BT.shape[1])), parallel),
        "left-padded": _left_padded(model, tokens_BT, parallel),
        "batched": _difference(torch.cat([log_probs(model, row) for row in tokens_BT.split(1)]), parallel),
    }
    if folder is not None:
        from transformers import AutoModelForCausalLM

        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(model.device).eval()
        errors["reloaded"] = _difference(log_probs(again, tokens_BT), parallel)
    rounding = _difference(_perturbed(model, tokens_BT), parallel)
    return GateResult(errors, min(LARGEST_TOLERANCE, max(TOLERANCE, 2 * rounding)), rounding)


def log_probs(model: Any, tokens_BT: Tensor, **given: Any) -> Tensor:
    """Log-probabilities [B, T, V] of one forward pass, without a cache unless one is given."""
    return model(input_ids=tokens_BT, **({"use_cache": False} | given)).logits.float().log_softmax(-1)


def _perturbed(model: Any, tokens_BT: Tensor) -> Tensor:
    """Log-probabilities after a change of the embeddings that rounding could have made."""
    embedded = model.get_input_embeddings()(tokens_BT)
    generator = torch.Generator(embedded.device).manual_seed(0)
    noise = torch.randn(embedded.shape, generator=generator, device=embedded.device, dtype=embedded.dtype)
    embedded = embedded * (1 + ROUNDING * noise)
    return model(inputs_embeds=embedded, use_cache=False).logits.float().log_softmax(-1)


def _in_pieces(model: Any, tokens_BT: Tensor, lengths: list[int]) -> Tensor:
    """The same, with the cache carried from piece to piece."""
    cache, found = None, []
    for piece in tokens_BT.split(lengths, dim=1):
        outputs = model(input_ids=piece, cache=cache, use_cache=True)
        cache = outputs.cache
        found.append(outputs.logits.float().log_softmax(-1))
    return torch.cat(found, dim=1)


def _odd_pieces(length: int) -> list[int]:
    """Pieces at odd places: 1, about a third, 1, 3 and the rest."""
    first = [1, length // 3 + 1, 1, 3]
    return [*first, length - sum(first)]


def _then_steps(length: int) -> list[int]:
    """A prefill, then single tokens."""
    return [length - STEPS] + [1] * STEPS


def _left_padded(model: Any, tokens_BT: Tensor, parallel: Tensor) -> float:
    """Rows cut to different lengths and padded on the left, prefilled together and continued by single tokens."""
    batch, length = tokens_BT.shape
    lengths = [length - STEPS - row * (length // (3 * batch)) for row in range(batch)]
    width = max(lengths)
    padded = torch.zeros(batch, width, dtype=tokens_BT.dtype, device=tokens_BT.device)
    mask = torch.zeros_like(padded)
    for row, size in enumerate(lengths):
        padded[row, width - size :], mask[row, width - size :] = tokens_BT[row, :size], 1
    outputs = model(input_ids=padded, attention_mask=mask, use_cache=True)
    worst = max(
        _difference(outputs.logits[row, width - size :].float().log_softmax(-1), parallel[row, :size])
        for row, size in enumerate(lengths)
    )
    for step in range(STEPS // 2):
        new = torch.stack([tokens_BT[row, size + step] for row, size in enumerate(lengths)])[:, None]
        mask = torch.cat((mask, torch.ones_like(new)), dim=1)
        outputs = model(input_ids=new, attention_mask=mask, cache=outputs.cache, use_cache=True)
        found = outputs.logits[:, 0].float().log_softmax(-1)
        worst = max(worst, *(_difference(found[row], parallel[row, size + step]) for row, size in enumerate(lengths)))
    return worst


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference where the probability is not negligible; NaN stays NaN."""
    gap = (found - wanted).abs()
    return float(gap[wanted > -15].max()) if not gap.isnan().any() else float("nan")
