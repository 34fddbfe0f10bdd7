"""Decoding of a model with keys and values on buffers that stay where they are, as `bench.convert.decode` does for states.

Both sides of a speed comparison run without launch overhead on a GPU: a student's step and a Transformer's step are each one
CUDA graph. A Transformer's cache is transformers' own static cache.

Shape legend: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticCache

from bench.convert.decode import Decoder
from bench.convert.student import LinearizedForCausalLM
from bench.recorded import WARM_UP_STEPS, RecordedStep

ALIGNED = 64
"""Keys that a static cache holds a multiple of: attention loads a mask of another width more slowly."""


class KeyValueDecoder(RecordedStep):
    """Steps a softmax Transformer from a prefilled cache.

    Args:
        model: in evaluation mode.
        cache: after a prefill of one sequence; its tensors are copied for every row.
        batch: rows B.
        room: tokens that may still be decoded.
    """

    def __init__(self, model: Any, cache: Any, batch: int, room: int) -> None:
        super().__init__(model, torch.zeros(batch, 1, dtype=torch.long, device=model.device))
        self.seen = int(cache.get_seq_length())
        length = -(-(self.seen + room + WARM_UP_STEPS + 1) // ALIGNED) * ALIGNED
        self.static: Any = StaticCache(config=model.config, max_cache_len=length)
        for mine, full in zip(self.static.layers, cache.layers, strict=True):
            mine.lazy_initialization(*(tensor.expand(batch, -1, -1, -1) for tensor in (full.keys, full.values)))
            mine.keys[:, :, : self.seen].copy_(full.keys.expand(batch, -1, -1, -1))
            mine.values[:, :, : self.seen].copy_(full.values.expand(batch, -1, -1, -1))
        self._rewind()
        self.record()

    def run(self) -> None:
        """One step; keys and values are appended to the static cache."""
        given: dict[str, Any] = {"cache": self.static, "use_cache": True, "position_ids": self.position_B1}
        self.logits_BV = self.model(input_ids=self.token_B1, **given).logits[:, 0]
        self.position_B1 += 1

    def _rewind(self) -> None:
        """Back to the end of the prefill; what later steps wrote is masked until it is overwritten."""
        for layer in self.static.layers:
            layer.cumulative_length.fill_(self.seen)
        self.position_B1.fill_(self.seen)

    def kept(self) -> Callable[[], None]:
        """Puts the cache back to the end of the prefill."""
        return self._rewind


class GrowingDecoder:
    """Steps a model on its own cache, for students that keep softmax layers and caches without a static form.

    Args:
        model: in evaluation mode.
        cache: after a prefill.
    """

    graph = None

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache, self.position = model, cache, int(cache.get_seq_length())

    @torch.no_grad()
    def step(self, token_B: Tensor) -> Tensor:
        """Reads one token a row; returns the logits [B, V]."""
        position = torch.full_like(token_B, self.position)[:, None]
        self.position += 1
        return self.model(input_ids=token_B[:, None], cache=self.cache, use_cache=True, position_ids=position).logits[:, 0]


def decoder(model: Any, cache: Any, batch: int, room: int) -> Any:
    """The fastest exact way of decoding a model that this program knows.

    Args:
        model: in evaluation mode.
        cache: after a prefill of one sequence.
        batch: rows.
        room: tokens that will be decoded.
    """
    converted = isinstance(model, LinearizedForCausalLM)
    if not converted and all(type(layer) is DynamicLayer for layer in cache.layers):
        return KeyValueDecoder(model, cache, batch, room)
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    if converted and not model.keeps_softmax:
        return Decoder(model, cache)
    return GrowingDecoder(model, cache)
