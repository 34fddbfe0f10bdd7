"""Random inputs of the timed kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.throughput.problem import Tensors


@dataclass(frozen=True)
class Draw:
    """Random tensors of one problem."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *size: int) -> Tensor:
        """Standard normal, in the problem's dtype."""
        return torch.randn(size, device=self.device, generator=self.generator).to(self.dtype)

    def uniform(self, *size: int) -> Tensor:
        """Between 0 and 1, in fp32."""
        return torch.rand(size, device=self.device, generator=self.generator)


def learned_in(inputs: Tensors, mode: str) -> tuple[str, ...]:
    """What a training step makes gradients of: every input."""
    return tuple(inputs) if mode == "train" else ()
