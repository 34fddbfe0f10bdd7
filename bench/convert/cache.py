"""The cache of a converted model: a constant-size state for converted layers, keys and values for kept softmax layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from mixers import State


class StateLayer(CacheLayerMixin):
    """One converted layer's state, whose size does not depend on how much has been read."""

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen = 0

    def store(self, state: State | None, n_tokens: int) -> None:
        """Takes over the state after a segment.

        Args:
            state: what the layer returned.
            n_tokens: length of the segment, padding included, as transformers counts it.
        """
        self.state, self.seen, self.is_initialized = state, self.seen + n_tokens, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The converted layer makes its own first state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not used: a converted layer keeps no keys and values of its own."""
        raise ValueError("a converted layer has no key-value cache; only kept softmax layers update one")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a causal mask over everything seen."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        """Moves the state to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Picks rows for beam search."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """A summed-up token cannot be taken out again."""
        raise ValueError("a recurrent state cannot be cropped; assisted decoding needs a model with a key-value cache")

    def _map(self, change: Any) -> None:
        if self.state is not None:
            self.state = {name: change(tensor) for name, tensor in self.state.items()}


class LinearizedCache(Cache):
    """The cache of a whole converted model.

    Args:
        config: the teacher's configuration, which tells softmax layers with a window from those without.
        converted: for every layer, whether it is converted.
    """

    def __init__(self, config: Any, converted: list[bool]) -> None:
        types = getattr(config, "layer_types", None) or ["full_attention"] * len(converted)
        layers: list[Any] = []
        for kind, is_converted in zip(types, converted, strict=True):
            if is_converted:
                layers.append(StateLayer())
            elif kind == "sliding_attention":
                layers.append(DynamicSlidingWindowLayer(sliding_window=config.sliding_window))
            else:
                layers.append(DynamicLayer())
        super().__init__(layers=layers)
        self.single_steps = 0
        self.steps_on_graph = all(converted)

    def nbytes(self) -> int:
        """Bytes held for the whole batch at this moment, counted from the live tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held."""
        held: list[torch.Tensor] = []
        for layer in self.layers:
            held += layer_tensors(layer)
        return held


def layer_tensors(layer: Any) -> list[Tensor]:
    """The tensors of one cache layer, ours or transformers' own."""
    if isinstance(layer, StateLayer):
        return list((layer.state or {}).values())
    return [tensor for tensor in (layer.keys, layer.values) if tensor is not None]
