"""Where the walks for Hopper are faster, how they are compiled, and how rows are cut for them.

Shape legend: B batch, T time, H heads, P segments, N chunks of C tokens, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kernels.delta_rule.delta_hopper_launch import ALIGNED
from kernels.operands import padded
from kernels.walks.walk_pieces import Pieces, n_segments

if TYPE_CHECKING:
    from kernels.walks.walk import Inputs

CHUNK = 64
"""Tokens of a chunk, which are the rows of one product of a warp group."""
WIDTH, NARROW = 128, 64
"""The widest heads that fit on chip, and the widest of which short rows are no faster."""
LONG, LONGER = 512, 1024
"""Tokens of a row that is not short, under a scalar gate and otherwise."""
LEAST_SEGMENT, PROGRAMS = 512, 128
"""Tokens below which the states between segments would cost more than they gain, and heads for which rows are cut no more."""


class Config(NamedTuple):
    """How a walk is compiled.

    Args:
        groups: groups of four warps.
        stages: chunks that are on their way or read.
    """

    groups: int
    stages: int


class Backward(NamedTuple):
    """How the gradients are compiled.

    Args:
        groups: groups of four warps.
        stages: chunks that are on their way or read in the walk of queries.
        back: the same in that of keys and values.
        slots: the same of the rows that the decays' gradient reads besides.
    """

    groups: int
    stages: int
    back: int
    slots: int


class States(NamedTuple):
    """How walks of states are compiled.

    Args:
        tile: columns of the values of a program.
        groups: groups of four warps.
        stages: chunks that are on their way or read.
    """

    tile: int
    groups: int
    stages: int


FORWARD = {NARROW: Config(1, 4), WIDTH: Config(2, 3)}
SHARED = Config(1, 4)
BACKWARD = {NARROW: Backward(1, 3, 2, 2), WIDTH: Backward(2, 3, 2, 1)}
"""By the width of keys and values on chip; heads that share keys apart."""
SUMS = {NARROW: States(64, 1, 4), WIDTH: States(128, 2, 3)}
"""Of the sums over segments, by the same width."""
KEPT = States(64, 2, 3)
"""Of the states between chunks."""
GROUPED = 2
"""Heads that share keys whose rows and states are on their way or read in the gradients: with three, one program fills an SM."""


def suits(inputs: Inputs) -> bool:
    """Whether both passes of these inputs are those of Hopper: what is known of fake tensors too.

    Narrow heads without a scalar gate only where the plain walks would cut their rows.
    """
    if not fits(inputs) or inputs.k.shape[2] != inputs.v.shape[2]:
        return False
    least, most = sorted((inputs.k.shape[3], inputs.v.shape[3]))
    faster = (inputs.log_decay is not None and inputs.log_decay.ndim == 3) or n_segments(inputs.k, inputs.v) > 1
    return least > NARROW or (most <= NARROW and faster and inputs.v.shape[1] >= LONG)


def suits_forward(inputs: Inputs) -> bool:
    """Whether the forward pass of heads with keys of their own is that of Hopper where the gradients are not: of narrow heads."""
    if not fits(inputs) or inputs.k.shape[2] != inputs.v.shape[2]:
        return False
    narrow = max(inputs.k.shape[3], inputs.v.shape[3]) <= NARROW
    return narrow and inputs.v.shape[1] >= LONGER and n_segments(inputs.k, inputs.v) == 1


def suits_shared(inputs: Inputs) -> bool:
    """Whether the states of heads that share keys are walked here, forward with their outputs: of wide keys and narrow values."""
    return fits(inputs) and width_on_chip(inputs.k) > NARROW >= width_on_chip(inputs.v)


def fits(inputs: Inputs) -> bool:
    """Whether there are walks for Hopper at all: for bf16 rows that are not packed."""
    q, k, v, _, _, starts = inputs
    if starts is not None or not v.is_cuda or torch.cuda.get_device_capability(v.device)[0] != 9:
        return False
    return all(x.dtype == torch.bfloat16 and x.shape[3] % ALIGNED == 0 and x.shape[3] <= WIDTH for x in (q, k, v))


def share_out(inputs: Inputs) -> Pieces:
    """Whole rows, or segments of whole chunks of long rows of few heads."""
    from kernels.walks.walk_triton import SEGMENTS, WHOLE

    batch, length, heads, _ = inputs.v.shape
    number = max(1, min(PROGRAMS // (batch * heads), length // LEAST_SEGMENT))
    span = -(-length // (number * CHUNK)) * CHUNK
    number = -(-length // span)
    return Pieces((WHOLE if number == 1 else SEGMENTS).value, number, span, None)


def width_on_chip(x: Tensor) -> int:
    """Of rows of keys or values."""
    return max(padded(x.shape[3]), NARROW)


def entering_like(inputs: Inputs) -> Tensor:
    """Room for what `forward` keeps for `backward` of heads with keys of their own, in fp32.

    Lines of scalar decays [B * H, N * C], what segments add to the state [B, P, H, K, V] and their decays [B, P, H], one after the
    other in [B, *], as vmap folds members into the batch.
    """
    return inputs.v.new_empty(*_in_batch(sizes(inputs), inputs), dtype=torch.float32)


def shared_like(inputs: Inputs) -> Tensor:
    """Room for what `forward` keeps for `backward` of heads that share keys, [B, *] likewise; see `shared_parts`."""
    return inputs.v.new_empty(*_in_batch(_shared_sizes(inputs), inputs))


def shared_parts(kept: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The states before the chunks [B, N, H, K, V], in the dtype of the values, and lines of scalar decays, in fp32."""
    (batch, _, heads, v_dim), k_dim = inputs.v.shape, inputs.k.shape[3]
    states, lines = kept.flatten().split(_shared_sizes(inputs))
    return states.view(batch, -1, heads, k_dim, v_dim), lines.view(torch.float32)


def _shared_sizes(inputs: Inputs) -> tuple[int, int]:
    """How many numbers of the dtype of the values states and lines take."""
    (batch, length, heads, v_dim), k_dim = inputs.v.shape, inputs.k.shape[3]
    lines = sizes(inputs)[0] * torch.float32.itemsize // inputs.v.element_size()
    return batch * -(-length // CHUNK) * heads * k_dim * v_dim, lines


def _in_batch(parts: tuple[int, ...], inputs: Inputs) -> tuple[int, int]:
    """The shape of so many numbers in all, with the batch first."""
    batch = inputs.v.shape[0]
    return batch, sum(parts) // batch


def sums_like(inputs: Inputs) -> tuple[Tensor, ...]:
    """Room for what segments add to a state and for their decays, in fp32, as in `entering_like`."""
    _, *of_sums = sizes(inputs)
    return inputs.v.new_empty(sum(of_sums), dtype=torch.float32).split(of_sums)


def sizes(inputs: Inputs) -> tuple[int, int, int]:
    """How many numbers lines, sums and decays of segments are."""
    (batch, length, heads, v_dim), gate, pieces = inputs.v.shape, inputs.log_decay, share_out(inputs)
    lines = batch * heads * -(-length // CHUNK) * CHUNK if gate is not None and gate.ndim == 3 else 0
    decays = batch * pieces.number * heads if pieces.number > 1 else 0
    return lines, decays * inputs.k.shape[3] * v_dim, decays
