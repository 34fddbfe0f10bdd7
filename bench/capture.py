"""Repeated work on a device: a CUDA graph where there is one, plain calls elsewhere."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


class Repeated:
    """A function without arguments that reads and writes fixed tensors only.

    On a GPU the first call runs it as it is, which also warms up whatever it uses; the second records it in a CUDA graph;
    from then on the graph is replayed, at the cost of one launch. Elsewhere every call runs it.

    Args:
        function: no branch on values, no synchronisation; what it returns is overwritten by the next call.
        device: where it runs.
        pool: memory pool that it shares with functions that never run at the same time, from `graph_pool`.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device, pool: Any = None) -> None:
        self.function, self.device, self.pool = function, device, pool
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None

    def __call__(self) -> Any:
        """Runs the function; its result."""
        if self.device.type != "cuda":
            return self.function()
        if not self.warm:
            self.warm = True
            return self._on_side_stream(self.function)
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()
        return self.result

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # without a stream of its own, a capture takes the first one made, which may be another device's
        graph = torch.cuda.graph(self.graph, pool=self.pool, stream=torch.cuda.Stream(self.device))
        gc.disable()  # it might free an old graph, which CUDA does not allow during a capture
        try:
            with graph:
                self.result = self.function()
        finally:
            gc.enable()

    def _on_side_stream(self, function: Callable[[], Any]) -> Any:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            result = function()
        torch.cuda.current_stream(self.device).wait_stream(side)
        return result


def graph_pool(device: torch.device) -> Any:
    """A memory pool for graphs that never run at the same time; None where there are no graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
