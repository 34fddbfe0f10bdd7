"""Launches the walks by key of attention to chosen blocks on torch tensors: lists, spans of tokens and room for shares.

Shape legend: B batch, H heads of q, G heads of k and v, T queries, S keys, K width of q and k, V width of v, R rows of the
index (1, or one for each of B G), W words of a token, P spans of tokens, C the most blocks of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.indexed_launch import Config, pack_of
from kernels.operands import _dot_dtype, _narrow, _precision, _rows, _triton_dtype, product_width
from kernels.sparse_index import Listed


class Plan(NamedTuple):
    """What a trial turns: configurations, spans, bytes of shares at a time."""

    forward: Config = Config(64, 64, 4, 3)
    backward: Config = Config(32, 64, 4, 3)
    join: Config = Config(32, 0, 4, 3)
    spans: int = 8
    launches: int = 1
    flip: bool = True
    listing: tuple[int, int, int] = (8, 256, 4)


class Lists(NamedTuple):
    """Who chose what; see `kernels.chosen_triton`."""

    before: Tensor
    slots: Tensor
    counts: Tensor
    span: int
    spans: int


def lists_of(index: Listed, n_keys: int, length: int, most: int, plan: Plan) -> Lists:
    from kernels import chosen_triton

    words = index.words.contiguous()
    rows, n_words, n_blocks = words.shape[0], words.shape[2], -(-n_keys // index.block)
    span = -(-length // plan.spans)
    spans = -(-length // span)
    before = words.new_empty(rows, length, n_words + 1)
    chosen_triton.ranks_kernel[(-(-rows * length // 128),)](words, before, rows * length, n_words, ROWS=128, num_warps=4)
    slots, counts = words.new_empty(rows, spans, n_blocks, span), words.new_empty(rows, spans, n_blocks)
    chosen_triton.choosers_kernel[(rows * spans * -(-n_blocks // plan.listing[0]),)](
        words, before, slots, counts, length, n_words, n_blocks, most, span, spans, BLOCKS=plan.listing[0], TOKENS=plan.listing[1], num_warps=plan.listing[2]
    )
    return Lists(before, slots, counts, span, spans)


def _widths(q: Tensor, k: Tensor, v: Tensor, unit: int, config: Config) -> dict[str, object]:
    k_dim, v_dim, dot = k.shape[3], v.shape[3], _dot_dtype(q, k, v)
    tiles = {"BK": product_width(k_dim, dot), "BV": product_width(v_dim, dot), "UNIT": unit, "M": config.queries, "N": config.keys}
    return {"K": k_dim, "V": v_dim, **tiles, "DOT": _triton_dtype(dot), "PRECISION": _precision(dot), "STAGES": config.stages}


def _join(
    shares: Tensor, lse_shares: Tensor | None, lists: Lists, out: Tensor, lse: Tensor | None, index: Listed, sizes: tuple[int, ...],
    tokens: tuple[int, int], plan: Plan,
) -> None:  # fmt: skip
    """Adds up what tokens have in shares: outputs if there is a log-sum-exp, else gradients of q."""
    from kernels import chosen_triton

    kv_heads, group, pack, most, ratio = sizes
    length, width = out.shape[1], out.shape[3]
    n_index, room = shares.shape[:2]
    tiles = -(-(tokens[1] - tokens[0]) * pack // plan.join.queries)
    chosen_triton.join_kernel[(n_index * (group // pack) * tiles,)](
        shares, shares if lse_shares is None else lse_shares, lists.before, out, out if lse is None else lse,
        length, kv_heads, group, pack, index.words.shape[0], index.words.shape[2], ratio, most, *tokens, room,
        V=width, BV=product_width(width, shares.dtype), M=plan.join.queries, WEIGHTED=lse is not None,
        STAGES=plan.join.stages, num_warps=plan.join.warps,
    )  # fmt: skip


def _parts(lists: Lists, length: int, launches: int) -> list[tuple[int, int, int, int]]:
    """First span, number of spans, first token and last of each launch."""
    each = -(-lists.spans // launches)
    firsts = range(0, lists.spans, each)
    return [(n, min(each, lists.spans - n), n * lists.span, min((n + each) * lists.span, length)) for n in firsts]


def forward(q: Tensor, k: Tensor, v: Tensor, index: Listed, most: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, T, V] and base-2 log-sum-exp [B, H, T]."""
    from kernels import chosen_triton

    (batch, heads, length), (kv_heads, n_keys), v_dim = q.shape[:3], k.shape[1:3], v.shape[3]
    y, lse = q.new_empty(batch, length, heads, v_dim), q.new_empty(batch, heads, length, dtype=torch.float32)
    dot = _dot_dtype(q, k, v)
    (q, k, v), strides, unit = _rows(*_narrow(dot, q, k, v))
    lists, config = lists_of(index, n_keys, length, most, plan), plan.forward
    group, ratio = heads // kv_heads, index.block // config.keys
    pack, n_index = pack_of(group), batch * kv_heads
    parts = _parts(lists, length, plan.launches)
    room = parts[0][1] * lists.span * most * ratio
    shares, lse_shares = q.new_empty(n_index, room, group, v_dim), lse.new_empty(n_index, room, group)
    for first, spans, *tokens in parts:
        chosen_triton.chosen_forward_kernel[(spans * n_index * -(-n_keys // index.block) * ratio,)](
            q, k, v, lists.slots, lists.counts, shares, lse_shares, *strides, n_index, length, n_keys, kv_heads, group, pack,
            n_keys - length, index.block, index.words.shape[0], most, lists.span, lists.spans, first, room,
            **_widths(q, k, v, unit, config), num_warps=config.warps, maxnreg=config.registers,
        )  # fmt: skip
        _join(shares, lse_shares, lists, y, lse, index, (kv_heads, group, pack, most, ratio), tuple(tokens), plan)
    return y.transpose(1, 2), lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, index: Listed, y: Tensor, lse: Tensor, dy: Tensor, most: int, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each stored with time before heads."""
    from kernels import chosen_keys_grad_triton as kernels

    (batch, heads, length), (kv_heads, n_keys), v_dim = q.shape[:3], k.shape[1:3], v.shape[3]
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape) for x in (q, k, v))
    (q, k, v, y, dy), strides, unit = _rows(*_narrow(_dot_dtype(q, k, v), q, k, v, y, dy))
    delta = torch.empty_like(lse)
    rows = batch * heads * length
    widths = _widths(q, k, v, unit, plan.backward)
    kernels.delta_kernel[(-(-rows // 64),)](
        y, dy, delta, *strides[9:], rows, length, heads, V=v_dim, BV=widths["BV"], UNIT=unit, ROWS=64, num_warps=4
    )
    lists, config = lists_of(index, n_keys, length, most, plan), plan.backward
    group, ratio = heads // kv_heads, index.block // config.keys
    pack, n_index = pack_of(group), batch * kv_heads
    parts = _parts(lists, length, plan.launches)
    room = parts[0][1] * lists.span * most * ratio
    shares = q.new_empty(n_index, room, group, q.shape[3])
    sums = tuple(delta.new_empty(lists.spans, *x.shape) for x in (dk, dv))
    for first, spans, *tokens in parts:
        kernels.chosen_backward_kernel[(spans * n_index * -(-n_keys // index.block) * ratio,)](
            q, k, v, lists.slots, lists.counts, lse, dy, delta, shares, *sums, *strides[:9], *strides[12:],
            n_index, length, n_keys, kv_heads, group, pack, n_keys - length, index.block, index.words.shape[0], most,
            lists.span, lists.spans, first, room, n_index * n_keys, **widths, FLIP=plan.flip,
            num_warps=config.warps, maxnreg=config.registers,
        )  # fmt: skip
        _join(shares, None, lists, dq, None, index, (kv_heads, group, pack, most, ratio), tuple(tokens), plan)
    n_rows = n_index * n_keys
    kernels.add_spans_kernel[(-(-n_rows // 16),)](
        *sums, lists.counts, dk, dv, n_keys, kv_heads, index.block, index.words.shape[0], n_rows, lists.spans,
        **{name: widths[name] for name in ("K", "V", "BK", "BV")}, ROWS=16, num_warps=4,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
