"""Decoding without launch overhead: one token through a converted model on buffers that stay where they are.

A state of constant size makes every step the same work on the same addresses, so on a GPU the step is one CUDA graph.

Shape legend: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from bench.convert.cache import LinearizedCache, StateLayer
from bench.convert.student import LinearizedForCausalLM
from bench.recorded import RecordedStep
from kernels.step import states_in_place

STEPS_BEFORE_CAPTURE = 4
"""Single steps of a cache before they are recorded: recording costs as much as some steps."""
KEPT_DECODERS = 4
"""Batch sizes whose recorded step a model keeps."""


class Decoder(RecordedStep):
    """Steps a fully converted model from a prefilled cache.

    Args:
        model: in evaluation mode, without kept softmax layers.
        cache: after a prefill; its tensors are copied.
        position_B: int64, position of the next token of every row; None means the number of tokens seen.

    Raises:
        ValueError: a layer keeps softmax, whose cache grows.
    """

    def __init__(self, model: LinearizedForCausalLM, cache: LinearizedCache, position_B: Tensor | None = None) -> None:
        states = [layer.state if isinstance(layer, StateLayer) else None for layer in cache.layers]
        if model.keeps_softmax or any(state is None for state in states):
            raise ValueError("the step has fixed buffers only if every layer is converted and the cache is prefilled")
        batch = len(next(iter((states[0] or {}).values())))
        start = torch.full((batch,), cache.get_seq_length(), device=model.device) if position_B is None else position_B
        super().__init__(model, start.to(torch.long)[:, None].clone())
        dense = torch.contiguous_format
        self.states = [{name: tensor.clone(memory_format=dense) for name, tensor in (state or {}).items()} for state in states]
        self.owner: LinearizedCache | None = None
        self.record()

    def run(self) -> None:
        """One step on the buffers: new states take the place of the old ones, where they were not written there at once."""
        cache = self.model.new_cache()
        cache.steps_on_graph = False
        layers = cast(list[StateLayer], cache.layers)
        for layer, state in zip(layers, self.states, strict=True):
            layer.state = state
        given: dict[str, Any] = {"cache": cache, "use_cache": True, "position_ids": self.position_B1}
        with states_in_place():
            self.logits_BV = self.model(input_ids=self.token_B1, **given).logits[:, 0]
        for layer, state in zip(layers, self.states, strict=True):
            for name, tensor in (layer.state or {}).items():
                if tensor is not state[name]:
                    state[name].copy_(tensor)
        self.position_B1 += 1

    def kept(self) -> Callable[[], None]:
        """Puts states and positions back."""
        before = [{name: tensor.clone() for name, tensor in state.items()} for state in self.states]
        position = self.position_B1.clone()

        def put_back() -> None:
            for state, old in zip(self.states, before, strict=True):
                for name, tensor in old.items():
                    state[name].copy_(tensor)
            self.position_B1.copy_(position)

        return put_back

    def read_on(self, cache: LinearizedCache, token_B1: Tensor, position_B1: Tensor) -> Tensor:
        """One step of a cache that `generate` holds, whose states live in this decoder's buffers from then on.

        Args:
            cache: prefilled, of as many rows.
            token_B1: the new tokens.
            position_B1: their positions.

        Returns:
            The logits [B, V], a copy.
        """
        layers = cast(list[StateLayer], cache.layers)
        if self.owner is not cache or any(layer.state is not state for layer, state in zip(layers, self.states, strict=True)):
            self._take(cache)
        self.position_B1.copy_(position_B1)
        logits_BV = self.step(token_B1[:, 0]).clone()
        for layer, state in zip(layers, self.states, strict=True):
            layer.store(state, 1)
        return logits_BV

    def _take(self, cache: LinearizedCache) -> None:
        """Copies a cache's states into the buffers; the cache that had them gets copies of its own."""
        given = [dict(layer.state or {}) for layer in cast(list[StateLayer], cache.layers)]
        if self.owner is not None:
            for layer, state in zip(cast(list[StateLayer], self.owner.layers), self.states, strict=True):
                if layer.state is state:
                    layer.state = {name: tensor.clone() for name, tensor in state.items()}
        for state, new in zip(self.states, given, strict=True):
            for name, tensor in state.items():
                tensor.copy_(new[name])
        self.owner = cache


def recorded_step(
    model: LinearizedForCausalLM, cache: LinearizedCache, token_B1: Tensor, position_BT: Tensor | None
) -> Tensor | None:
    """The logits [B, V] of one new token a row by a recorded step, or None where it does not pay yet or cannot be.

    Args:
        model: in evaluation mode, on a GPU.
        cache: prefilled.
        token_B1: int64.
        position_BT: positions, or None for the number of tokens seen.
    """
    cache.single_steps += 1
    if cache.single_steps <= STEPS_BEFORE_CAPTURE or any(not cast(StateLayer, layer).state for layer in cache.layers):
        return None
    weight = cast(Tensor, model.get_input_embeddings().weight)
    key = (len(token_B1), weight.dtype, weight.data_ptr())
    decoder = model.decoders.pop(key, None) or Decoder(model, cache)
    while len(model.decoders) >= KEPT_DECODERS:
        model.decoders.pop(next(iter(model.decoders)))
    model.decoders[key] = decoder
    seen = torch.full_like(token_B1, cache.get_seq_length()) if position_BT is None else position_BT
    return decoder.read_on(cache, token_B1, seen)
