"""A step of decoding on buffers that stay where they are: the same work on the same addresses every time, on a GPU one CUDA graph.

Shape legend: B batch, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP_STEPS = 3


class RecordedStep(ABC):
    """Steps a model by one token a row.

    `bench.capture.Repeated` counts its first call, which warms up, as work done; here warming up is undone, so that the graph is
    there before the first token is read.

    Args:
        model: in evaluation mode.
        position_B1: int64, position of the next token of every row; every step moves it on.
    """

    def __init__(self, model: Any, position_B1: Tensor) -> None:
        self.model = model
        self.position_B1: Tensor = position_B1
        self.token_B1 = torch.zeros_like(position_B1)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_BV = torch.empty(0)

    @abstractmethod
    def run(self) -> None:
        """One step on the buffers: reads `token_B1`, sets `logits_BV`."""

    @abstractmethod
    def kept(self) -> Callable[[], None]:
        """Puts the buffers back to what they are now; may be called more than once."""

    @torch.no_grad()
    def record(self) -> None:
        """Records the step on a GPU; warming up changes the buffers, so they are put back."""
        if self.model.device.type != "cuda":
            return
        put_back = self.kept()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        put_back()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()
        put_back()

    @torch.no_grad()
    def step(self, token_B: Tensor) -> Tensor:
        """Reads one token a row; returns the logits [B, V], which the next step overwrites."""
        self.token_B1.copy_(token_B[:, None])
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        return self.logits_BV
