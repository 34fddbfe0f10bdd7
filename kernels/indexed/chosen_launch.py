"""Attention to chosen blocks on torch tensors: lists made from the choice, and gradients walked by query or by key.

Walked by query (`indexed_launch`), a tile of tokens visits the keys that any of them chose, which is little more than
each chose as long as there are few blocks to choose from. With many, gradients are walked by key (`chosen_shares_triton`):
each key is read once for many tokens, and a token's dq comes in shares.

Shape legend: B batch, H heads of q, G heads of k and v, T queries, S keys, K width of q and k, V width of v, R rows of the
index (1, or one for each of B G), N blocks, W words of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.indexed import indexed_launch
from kernels.indexed.indexed_launch import Config, list_tile, pack_of
from kernels.indexed.sparse_index import Listed, pack, packed
from kernels.operands import _dot_dtype, _narrow, _precision, _rows, _triton_dtype, product_width

BY_KEY_FROM = 8
"""Blocks for each one that a token reads, from which on gradients are walked by key."""
SPANS, SHORTEST_SPAN = 8, 64
"""Spans of tokens at a time, with an fp32 part of the gradients of keys each, and fewest tokens of one."""
SHARE_BYTES = 1 << 31
"""Room for shares at a time."""
ROWS_OF_DELTA, ROWS_TO_SUM = 64, 16
BLOCKS_TO_LIST, TOKENS_TO_LIST = 8, 256
SHARES = Config(32, 0, 4, 3)
"""How shares are summed."""
# By the larger of the widths of k and v, for 16-bit and for fp32 operands; wider heads are walked by query.
SIXTEEN_BIT = {128: Config(32, 64, 4, 3)}
FP32 = {64: Config(32, 32, 4, 1), 128: Config(16, 16, 4, 1)}


class Chosen(NamedTuple):
    """Which keys a token sees by choice.

    Args:
        chosen: [R, T, N] bool, whether a token chose a block.
        block: keys of a block.
        most: blocks that a token chose at most.
    """

    chosen: Tensor
    block: int
    most: int


class Lists(NamedTuple):
    """Who chose a block; see `kernels.indexed.chosen_lists_triton`."""

    before: Tensor
    slots: Tensor
    counts: Tensor
    span: int
    spans: int
    parts: int
    most: int


class Walk(NamedTuple):
    """What the launches of a walk by key share."""

    n_index: int
    length: int
    n_keys: int
    kv_heads: int
    group: int
    block: int
    index_rows: int
    ratio: int

    @property
    def key_tiles(self) -> int:
        """Tiles of keys of one head, of all its blocks."""
        return -(-self.n_keys // self.block) * self.ratio

    def sizes(self, lists: Lists, first: int, room: int) -> tuple[int, ...]:
        """The kernel's run-time integers, for the spans from `first` on."""
        sizes = (self.n_index, self.length, self.n_keys, self.kv_heads, self.group, pack_of(self.group), self.n_keys - self.length)
        own = (lists.most, lists.span, lists.spans, first, room, lists.parts, self.n_index * self.n_keys)
        return *sizes, self.block, self.index_rows, *own


def key_config(width: int, dtype: torch.dtype, block: int) -> Config | None:
    """The configuration of the walk by key, None if there is none for these heads and blocks."""
    table = FP32 if dtype == torch.float32 else SIXTEEN_BIT
    found = next((config for limit, config in table.items() if width <= limit), None)
    return found if found and block % found.keys == 0 else None


def forward(q: Tensor, k: Tensor, v: Tensor, index: Chosen) -> tuple[Tensor, Tensor]:
    """Attention to chosen blocks.

    Args:
        q: queries [B, H, T, K].
        k: keys [B, G, S, K].
        v: values [B, G, S, V].
        index: which keys a query sees.

    Returns:
        The outputs [B, H, T, V] in the dtype of q, stored as [B, T, H, V], and the base-2 log-sum-exp [B, H, T].
    """
    return indexed_launch.forward(q, k, v, None, _listed(index, q, k, v))


def backward(q: Tensor, k: Tensor, v: Tensor, index: Chosen, y: Tensor, lse: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each stored with time before heads."""
    config = key_config(max(k.shape[3], v.shape[3]), _dot_dtype(q, k, v), index.block)
    if config is None or index.chosen.shape[2] < BY_KEY_FROM * index.most:
        return indexed_launch.backward(q, k, v, None, _listed(index, q, k, v), y, lse, dy)
    return _backward_by_key(q, k, v, index, y, lse, dy, config)


def _listed(index: Chosen, q: Tensor, k: Tensor, v: Tensor) -> Listed:
    return packed(index.chosen, index.block, list_tile(q, k, v), k.shape[2])


def _lists(index: Chosen, walk: Walk, token_bytes: int) -> Lists:
    """Tokens of each block by spans, of which so many are walked at a time that the bytes of their shares have room."""
    from kernels.indexed import chosen_lists_triton

    words, before = pack(index.chosen)
    (rows, length, n_words), n_blocks = words.shape, index.chosen.shape[2]
    span, parts = share_out(walk, token_bytes)
    spans = -(-length // span)
    slots, counts = words.new_empty(rows, spans, n_blocks, span), words.new_empty(rows, spans, n_blocks)
    chosen_lists_triton.slots_kernel[(rows * spans * -(-n_blocks // BLOCKS_TO_LIST),)](
        words, before, slots, counts, length, n_words, n_blocks, index.most, span, spans,
        BLOCKS=BLOCKS_TO_LIST, TOKENS=TOKENS_TO_LIST, num_warps=4,
    )  # fmt: skip
    return Lists(before, slots, counts, span, spans, parts, index.most)


def share_out(walk: Walk, token_bytes: int) -> tuple[int, int]:
    """Tokens of a span, and how many spans are walked at a time, from the shape alone."""
    parts = max(1, min(SPANS, walk.length // SHORTEST_SPAN))
    launches = -(-walk.length * token_bytes // SHARE_BYTES)
    span = -(-walk.length // (parts * launches))
    return span, min(parts, -(-walk.length // span))


def _walk(q: Tensor, k: Tensor, index: Chosen, config: Config) -> Walk:
    (batch, heads, length), (kv_heads, n_keys) = q.shape[:3], k.shape[1:3]
    ratio = index.block // config.keys
    return Walk(batch * kv_heads, length, n_keys, kv_heads, heads // kv_heads, index.block, index.chosen.shape[0], ratio)


def _launches(walk: Walk, lists: Lists) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """First span, number of programs, and first and last token of each launch."""
    for first in range(0, lists.spans, lists.parts):
        spans = min(lists.parts, lists.spans - first)
        tokens = first * lists.span, min((first + spans) * lists.span, walk.length)
        yield first, spans * walk.n_index * walk.key_tiles, tokens


def _backward_by_key(
    q: Tensor, k: Tensor, v: Tensor, index: Chosen, y: Tensor, lse: Tensor, dy: Tensor, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.indexed import chosen_shares_triton

    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape) for x in (q, k, v))
    (q, k, v, y, dy), strides, unit = _rows(*_narrow(_dot_dtype(q, k, v), q, k, v, y, dy))
    walk, constants = _walk(q, k, index, config), _constants(q, k, v, unit, config)
    delta, rows = torch.empty_like(lse), lse.numel()
    chosen_shares_triton.delta_kernel[(-(-rows // ROWS_OF_DELTA),)](
        y, dy, delta, *strides[9:], rows, walk.length, q.shape[1], V=v.shape[3], BV=constants["BV"], UNIT=unit, ROWS=ROWS_OF_DELTA,
        num_warps=4,
    )  # fmt: skip
    slot = index.most * walk.ratio
    lists = _lists(index, walk, walk.n_index * slot * walk.group * k.shape[3] * q.element_size())
    room = lists.parts * lists.span * slot
    shares = q.new_empty(walk.n_index, room, walk.group, k.shape[3])
    sums = tuple(delta.new_empty(lists.parts, *x.shape) for x in (dk, dv))
    n_rows = walk.n_index * walk.n_keys
    for first, programs, tokens in _launches(walk, lists):
        chosen_shares_triton.shares_kernel[(programs,)](
            q, k, v, lists.slots, lists.counts, lse, dy, delta, shares, *sums, *strides[:9], *strides[12:],
            *walk.sizes(lists, first, room), **constants, num_warps=config.warps, maxnreg=config.registers,
        )  # fmt: skip
        _sum_shares(walk, lists, tokens, shares, dq)
    chosen_shares_triton.sum_parts_kernel[(-(-n_rows // ROWS_TO_SUM),)](
        *sums, lists.counts, dk, dv, walk.n_keys, walk.kv_heads, walk.block, walk.index_rows, lists.parts, lists.spans, n_rows,
        **{name: constants[name] for name in ("K", "V", "BK", "BV")}, ROWS=ROWS_TO_SUM, num_warps=4,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _sum_shares(walk: Walk, lists: Lists, tokens: tuple[int, int], shares: Tensor, dq: Tensor) -> None:
    """Gradients of q of some tokens from their shares."""
    from kernels.indexed import chosen_shares_triton

    pack, width = pack_of(walk.group), dq.shape[3]
    tiles = -(-(tokens[1] - tokens[0]) * pack // SHARES.queries)
    chosen_shares_triton.sum_shares_kernel[(walk.n_index * (walk.group // pack) * tiles,)](
        shares, lists.before, dq, walk.length, walk.kv_heads, walk.group, pack, walk.index_rows, lists.before.shape[2] - 1,
        walk.ratio, lists.most, *tokens, shares.shape[1], K=width, BK=product_width(width, shares.dtype), M=SHARES.queries,
        STAGES=SHARES.stages, num_warps=SHARES.warps,
    )  # fmt: skip


def _constants(q: Tensor, k: Tensor, v: Tensor, unit: int, config: Config) -> dict[str, object]:
    """The compile-time arguments of a walk by key."""
    k_dim, v_dim, dot = k.shape[3], v.shape[3], q.dtype
    tiles = {"BK": product_width(k_dim, dot), "BV": product_width(v_dim, dot), "UNIT": unit, "M": config.queries, "N": config.keys}
    return {"K": k_dim, "V": v_dim, **tiles, "DOT": _triton_dtype(dot), "PRECISION": _precision(dot), "STAGES": config.stages}
