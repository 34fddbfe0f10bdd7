"""Decoding without launch overhead: one token through a converted model on buffers that stay where they are.

A state of constant size makes every step the same work on the same addresses, so on a GPU the step is one CUDA graph.

Shape legend: B batch, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bench.convert.cache import LinearizedCache, StateLayer
from bench.convert.student import LinearizedForCausalLM
from kernels.step import states_in_place

WARM_UP_STEPS = 3


class Decoder:
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
        self.model = model
        dense = torch.contiguous_format
        self.states = [{name: tensor.clone(memory_format=dense) for name, tensor in (state or {}).items()} for state in states]
        batch = len(next(iter(self.states[0].values())))
        seen = cache.get_seq_length()
        self.token_B1 = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        start = torch.full((batch,), seen, device=model.device) if position_B is None else position_B
        self.position_B1 = start.to(torch.long)[:, None].clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_BV = torch.empty(0)
        if model.device.type == "cuda":
            self._capture()

    @torch.no_grad()
    def step(self, token_B: Tensor) -> Tensor:
        """Reads one token a row; returns the logits [B, V], which the next step overwrites."""
        self.token_B1.copy_(token_B[:, None])
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        return self.logits_BV

    def _run(self) -> None:
        """One step on the buffers: new states take the place of the old ones, where they were not written there at once."""
        cache = self.model.new_cache()
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

    @torch.no_grad()
    def _capture(self) -> None:
        """Records the step; warming up changes the buffers, so they are put back."""
        before = [{name: tensor.clone() for name, tensor in state.items()} for state in self.states]
        position = self.position_B1.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()
        for state, kept in zip(self.states, before, strict=True):
            for name, tensor in kept.items():
                state[name].copy_(tensor)
        self.position_B1.copy_(position)
