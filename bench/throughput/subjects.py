"""What a row of `bench throughput` is about: its problem at the timed shape and at the gate's, its bound and state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from bench.throughput import mixers as whole
from bench.throughput.attentions import ChosenBlocks
from bench.throughput.bounds import Shape
from bench.throughput.draws import Draw
from bench.throughput.kernels import OPERATIONS
from bench.throughput.names import KERNELS, KernelName
from bench.throughput.plan import Row
from bench.throughput.problem import Problem
from kernels.indexed.chosen_launch import BY_KEY_FROM

if TYPE_CHECKING:
    from bench.throughput.measure import Session

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GATE_BATCH, GATE_HEADS, GATE_CHANNELS = 2, 2, 48
GATE_LENGTHS = {"cuda": 193, "cpu": 37}
"""Of what is run token by token; attention is compared at a length that several blocks of its window fit in."""
ATTENTION_LENGTH = 300
FEW_CHOSEN, MANY_BLOCKS_LENGTH = 2, 1100
"""Blocks that a token chooses, and the length, where a row's tokens choose few of many: kernels walk otherwise there."""


class KernelRow:
    """A kernel's row: its problems at the timed shape and at the gate's."""

    def __init__(self, row: Row, session: Session) -> None:
        self.row, self.session = row, session
        self.kernel, self.operation = KERNELS[cast(KernelName, row.name)], OPERATIONS[cast(KernelName, row.name)]
        self.draw = Draw(session.device, DTYPES[row.dtype], session.generator)
        self.shape = self.kernel.shape(row.batch, row.length, row.heads, row.width)

    def prepare(self) -> None:
        """Nothing to build."""

    def facts(self) -> dict[str, Any]:
        """The bound and the state."""
        item = DTYPES[self.row.dtype].itemsize
        cost = self.operation.cost(self.shape, self.row.mode, item)
        return {"bound": self.session.bound(cost), "state_bytes": self.operation.state_bytes(self.shape, item)}

    def small(self, batch: int = GATE_BATCH, heads: int = GATE_HEADS) -> tuple[Problem, str]:
        """The problem of the gate, and its definition in words."""
        length = GATE_LENGTHS[self.session.device.type]
        if self.row.name in ("attention", "window", "chosen_blocks"):
            length = ATTENTION_LENGTH
        if self.kernel.layout in ("channels", "states"):
            shape = Shape(batch, length, GATE_CHANNELS, key=self.shape.key)
        else:
            shape = self.kernel.shape(batch, length, heads, self.row.width)
        return self.operation.problem(shape, self.row.mode, self.draw), f"definition at {_sizes_text(shape.sizes())}"

    @property
    def few_of_many(self) -> bool:
        """Whether tokens choose few of many blocks, whose gradients other kernels make."""
        operation = self.operation
        return isinstance(operation, ChosenBlocks) and self.row.length >= BY_KEY_FROM * operation.chosen * operation.block

    def gated(self) -> tuple[Problem, str]:
        """The problem of the row's own gate: a small one that takes the kernels of the row."""
        if not self.few_of_many:
            return self.small()
        operation = replace(cast(ChosenBlocks, self.operation), chosen=FEW_CHOSEN)
        shape = self.kernel.shape(GATE_BATCH, MANY_BLOCKS_LENGTH, GATE_HEADS, self.row.width)
        against = f"definition at {_sizes_text(shape.sizes())}, {FEW_CHOSEN} blocks chosen"
        return operation.problem(shape, self.row.mode, self.draw), against

    def full(self) -> Problem:
        """The problem that is timed."""
        return self.operation.problem(self.shape, self.row.mode, self.draw)


class MixerRow:
    """A mixer's row."""

    few_of_many = False

    def __init__(self, row: Row, session: Session) -> None:
        self.row, self.session = row, session

    def prepare(self) -> None:
        """Builds the mixers; what they refuse is the row's reason."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            longest = max(self.row.length, GATE_LENGTHS[self.session.device.type]) + 1
            self.stack = whole.Stack(self.row.layers, self.row.width, longest)
        self.stack = self.stack.to(self.session.device, DTYPES[self.row.dtype])

    def facts(self) -> dict[str, Any]:
        """The bound and the state."""
        row, dtype = self.row, DTYPES[self.row.dtype]
        cost = whole.cost(self.stack, row.mode, row.batch, row.length, dtype)
        return {"bound": self.session.bound(cost), "state_bytes": self.stack.counts(row.length, dtype)["state_bytes"]}

    def gated(self) -> tuple[Problem, str]:
        """The problem of the row's own gate, and its definition in words."""
        length = GATE_LENGTHS[self.session.device.type]
        problem = whole.problem(self.stack, self.row.mode, GATE_BATCH, length, generator=self.session.generator)
        return problem, f"Mixer.step, token by token, at {_sizes_text({'batch': GATE_BATCH, 'length': length})}"

    def full(self) -> Problem:
        """The problem that is timed."""
        row = self.row
        return whole.problem(self.stack, row.mode, row.batch, row.length, generator=self.session.generator)


def _sizes_text(sizes: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
