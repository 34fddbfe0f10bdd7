"""How rows of tokens are shared out to programs: whole, as packed sequences, or as segments of a long row.

Shape legend: B batch, T time, H heads, P pieces, N packed sequences.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

HEADS_AT_ONCE = 128
"""Heads of all batches that fill a device, one for each of about as many multiprocessors; rows of fewer are cut into segments."""
PROGRAMS = 256
"""Programs of a walk that rows are cut for, where a program has VALUES columns."""
VALUES = 64
SHORTEST_SEGMENT = 512
"""Tokens below which the states between segments would cost more than the segments gain."""
MULTIPLE = 64
"""What divides all segments but the last: the longest chunk of a walk, so that the chunks of a row are those of a whole one."""


class Pieces(NamedTuple):
    """How rows of tokens are shared out.

    Args:
        kind: WHOLE, SEQUENCES or SEGMENTS of `kernels.walks.walk_triton`.
        number: pieces of a row.
        length: tokens of a segment.
        starts: bounds of packed sequences, or None.
    """

    kind: int
    number: int
    length: int
    starts: Tensor | None

    def sequences(self, batch: int) -> int:
        """Sequences that have states of their own."""
        return batch if self.starts is None else batch * self.number


def n_segments(k_BTGK: Tensor, v_BTHV: Tensor) -> int:
    """Segments into which each row is cut; depends on nothing but the shapes. Keys that heads share are cheap to read again."""
    batch, length, heads, v_dim = v_BTHV.shape
    if batch * heads >= HEADS_AT_ONCE and k_BTGK.shape[2] == heads:
        return 1
    programs = batch * heads * -(-v_dim // VALUES)
    number = max(1, min(PROGRAMS // programs, length // SHORTEST_SEGMENT))
    return -(-length // segment_length(number, length))


def segment_length(number: int, length: int) -> int:
    """Tokens of each of about so many segments, which are whole chunks; the last may be shorter."""
    return -(-length // (number * MULTIPLE)) * MULTIPLE


def share_out(k_BTGK: Tensor, v_BTHV: Tensor, starts: Tensor | None) -> Pieces:
    """Packed sequences, segments of long rows of few heads, or whole rows."""
    from kernels.walks.walk_triton import SEGMENTS, SEQUENCES, WHOLE

    length = v_BTHV.shape[1]
    if starts is not None:
        return Pieces(SEQUENCES.value, starts.shape[0] - 1, length, starts.contiguous())
    number = n_segments(k_BTGK, v_BTHV)
    return Pieces((WHOLE if number == 1 else SEGMENTS).value, number, segment_length(number, length), None)
