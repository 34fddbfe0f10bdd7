"""Launches the kernels of attention over an index on torch tensors: configurations, strides and allocations.

Shape legend: B batch, H heads of q, G heads of k and v, T queries, S keys, K width of q and k, V width of v, R rows of the
index (1, or one for each of B G), W words of a token, I tiles of queries, J tiles of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.indexed.sparse_index import Listed
from kernels.operands import _dot_dtype, _narrow, _precision, _rows, _triton_dtype, product_width

MAX_PACK = 16
WALK = ("K", "V", "BK", "BV", "UNIT", "M", "N", "DOT", "PRECISION", "STAGES")
"""Compile-time arguments of a walk over a band among the keys themselves."""
FLAGS_AT_ONCE = 256
"""Tiles that a program lists at a time, the same at every length, so that a new one compiles nothing."""
TOKENS_AT_ONCE, ROWS_TO_ADD = 1024, 16
"""Tokens that a program lists at a time, and rows of gradients that it adds up."""
WALKS, MAX_PARTS, SHORTEST_PART = 2048, 8, 8
"""Walks over tokens that keep a device busy; most parts of one, since each is stored in fp32; fewest tiles of a part."""


class Config(NamedTuple):
    """How a kernel is compiled.

    Args:
        queries: rows of a tile of queries.
        keys: keys of a tile.
        warps: warps of a program.
        stages: depth of the software pipeline that loads tiles.
        registers: most registers of a thread, None for as many as the compiler likes; fewer let more programs share an SM.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


class Configs(NamedTuple):
    """The configurations of the forward walk, of the walk for dq, and of those for dk and dv: over tiles and over tokens."""

    forward: Config
    query: Config
    key: Config
    token: Config | None = None


class Band(NamedTuple):
    """Which keys a token sees by position; see `kernels.indexed.indexed_triton`.

    Args:
        window: keys seen, the own one included.
        sinks: first tokens of the sequence that are seen besides.
        front: stored sinks before all other keys; 0 if the sinks are keys of the segment itself.
        past: stored keys between them and the segment's own.
    """

    window: int
    sinks: int
    front: int
    past: int


# By the larger of the widths of k and v (the first at least as large counts), for 16-bit and for fp32 operands.
BAND_16 = {
    64: Configs(Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    128: Configs(Config(64, 32, 4, 3, 168), Config(64, 32, 4, 2, 168), Config(32, 64, 4, 2)),
    256: Configs(Config(64, 64, 8, 1), Config(64, 32, 8, 1), Config(32, 64, 8, 1)),
}
# All three kernels share the tiles of a list; the last may take a tile of queries in parts.
LISTED_16 = {
    64: Configs(Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    128: Configs(Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(32, 64, 4, 2), Config(32, 64, 4, 3)),
    256: Configs(Config(64, 64, 8, 1), Config(64, 64, 8, 1), Config(32, 64, 8, 1), Config(32, 64, 8, 1)),
}
FP32 = {
    64: Configs(*[Config(32, 32, 4, 1)] * 4),
    128: Configs(*[Config(16, 16, 4, 1)] * 4),
    256: Configs(*[Config(16, 16, 4, 1)] * 4),
}


def configs(width: int, dtype: torch.dtype, *, listed: bool) -> Configs:
    """The shipped configurations."""
    table = FP32 if dtype == torch.float32 else LISTED_16 if listed else BAND_16
    return next(config for limit, config in table.items() if width <= limit)


def list_tile(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Tokens and keys of a tile of a list."""
    config = configs(max(k.shape[3], v.shape[3]), _dot_dtype(q, k, v), listed=True).forward
    return config.queries // pack_of(q.shape[1] // k.shape[1]), config.keys


def pack_of(group: int) -> int:
    """Heads of a bundle: the largest power of two that divides the group, at most `MAX_PACK`."""
    return min(group & -group, MAX_PACK)  # `gcd` knows no symbol of a compiler


def forward(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, start_B: Tensor | None, index: Band | Listed) -> tuple[Tensor, Tensor]:
    """Softmax attention over an index.

    Args:
        q_BHTK: queries.
        k_BGSK: keys; G divides H.
        v_BGSV: values.
        start_B: int64, absolute position of the first query if keys are stored before it, else None.
        index: which keys a query sees.

    Returns:
        The outputs [B, H, T, V] in the dtype of q, stored as [B, T, H, V], and the base-2 log-sum-exp [B, H, T].
    """
    from kernels.indexed import indexed_triton

    batch, heads, length = q_BHTK.shape[:3]
    v_dim = v_BGSV.shape[3]
    y = q_BHTK.new_empty(batch, length, heads, v_dim)
    lse = q_BHTK.new_empty(batch, heads, length, dtype=torch.float32)
    (q, k, v), strides, unit = _rows(*_narrow(_dot_dtype(q_BHTK, k_BGSK, v_BGSV), q_BHTK, k_BGSK, v_BGSV))
    lists = _lists(index, k, by_key=False)
    config = _chosen(q, k, v, index).forward
    indexed_triton.forward_kernel[(_query_tiles(q, k, config),)](
        q, k, v, k if start_B is None else start_B, *lists, y, lse, *strides, *_sizes(q, k, index),
        **_constants(q, k, v, index, start_B, unit, config), num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    return y.transpose(1, 2), lse


def backward(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, start_B: Tensor | None, index: Band | Listed,
    y_BHTV: Tensor, lse_BHT: Tensor, dy_BHTV: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, each stored with time before heads."""
    from kernels.indexed import indexed_grad_triton

    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape) for x in (q_BHTK, k_BGSK, v_BGSV))
    delta = torch.empty_like(lse_BHT)
    dot = _dot_dtype(q_BHTK, k_BGSK, v_BGSV)
    (q, k, v, y, dy), strides, unit = _rows(*_narrow(dot, q_BHTK, k_BGSK, v_BGSV, y_BHTV, dy_BHTV))
    starts = k if start_B is None else start_B
    chosen = _chosen(q, k, v, index)
    sizes, config = _sizes(q, k, index), chosen.query
    indexed_grad_triton.query_kernel[(_query_tiles(q, k, config),)](
        q, k, v, starts, *_lists(index, k, by_key=False), y, lse_BHT, dy, dq, delta, *strides, *sizes,
        **_constants(q, k, v, index, start_B, unit, config), num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    walked = (q, k, v, lse_BHT, dy, delta)
    if isinstance(index, Listed) and chosen.token and index.block % chosen.token.keys == 0:
        _chosen_key_gradients(walked, index, (*strides[:9], *strides[12:]), unit, chosen.token, dk, dv)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    config = chosen.key
    constants = _constants(q, k, v, index, start_B, unit, config)
    n_index, parts, *far = _far_gradients(walked, index, (*strides[:9], *strides[12:]), sizes, constants, config)
    indexed_grad_triton.key_kernel[(n_index * -(-k.shape[2] // config.keys),)](
        q, k, v, starts, *_lists(index, k, by_key=True), lse_BHT, dy, delta, *far, dk, dv,
        *strides[:9], *strides[12:], *sizes, n_index, parts, **constants, num_warps=config.warps, maxnreg=config.registers,
        SPLIT=chosen.query.queries // config.queries if isinstance(index, Listed) else 1, FAR=parts > 0,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _chosen_key_gradients(
    walked: tuple[Tensor, ...], index: Listed, strides: tuple[int, ...], unit: int, config: Config, dk: Tensor, dv: Tensor
) -> None:
    """Gradients of keys and values from the tokens that chose them; see `kernels.indexed.chosen_grad_triton`."""
    from kernels.indexed import chosen_grad_triton

    q, k, v, lse, dy, delta = walked
    n_index, n_keys, length, (index_rows, _, n_words) = k.shape[0] * k.shape[1], k.shape[2], q.shape[2], index.words.shape
    n_blocks, group = -(-n_keys // index.block), q.shape[1] // k.shape[1]
    tokens = index.words.new_empty(index_rows, n_blocks, length)
    counts = index.words.new_empty(index_rows, n_blocks)
    chosen_grad_triton.choosers_kernel[(index_rows * n_blocks,)](
        index.words.contiguous(), tokens, counts, length, n_words, n_blocks, BLOCK=TOKENS_AT_ONCE, num_warps=4
    )
    tiles, pack = -(-n_keys // config.keys), pack_of(group)
    parts, share = share_out(n_index * tiles, length, config.queries // pack)
    sums = tuple(delta.new_empty(parts, *x.shape) for x in (dk, dv))  # in fp32 even if there is one part: the same kernel
    widths = {name: value for name, value in _constants(q, k, v, index, None, unit, config).items() if name in WALK}
    lists = (index.block, index_rows, n_index * n_keys, share, parts)
    chosen_grad_triton.chosen_key_kernel[(n_index * parts * tiles,)](
        q, k, v, tokens, counts, lse, dy, delta, *sums, *strides, length, n_keys, k.shape[1], group, pack, n_keys - length, *lists,
        **widths, num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    chosen_grad_triton.add_parts_kernel[(-(-n_index * n_keys // ROWS_TO_ADD),)](
        *sums, counts, dk, dv, n_keys, k.shape[1], *lists, **{name: widths[name] for name in ("K", "V", "BK", "BV")},
        ROWS=ROWS_TO_ADD, num_warps=4,
    )  # fmt: skip


def share_out(walks: int, length: int, tokens: int) -> tuple[int, int]:
    """Into how many parts the longest walk over tokens may be cut, and tokens of a part, from the shape alone."""
    tiles = -(-length // tokens)
    parts = max(1, min(WALKS // walks, MAX_PARTS, tiles // SHORTEST_PART))
    share = -(-tiles // parts)
    return -(-tiles // share), share * tokens


def _far_gradients(
    walked: tuple[Tensor, ...], index: Band | Listed, strides: tuple[int, ...], sizes: tuple[int, ...],
    constants: dict[str, object], config: Config,
) -> tuple[int, int, Tensor, Tensor]:  # fmt: skip
    """B G, the number of parts, and the gradients of sinks from queries beyond their window, [parts, B G, sinks, K or V]."""
    from kernels.indexed import indexed_grad_triton

    _, k, v, _, _, delta = walked
    n_index, parts = k.shape[0] * k.shape[1], far_parts(index, config, sizes[0], sizes[4])
    if not isinstance(index, Band) or not parts:
        return n_index, 0, delta, delta
    dk, dv = (delta.new_empty(parts, n_index, index.sinks, x.shape[3]) for x in (k, v))
    indexed_grad_triton.far_kernel[(n_index * -(-index.sinks // config.keys) * parts,)](
        *walked, dk, dv, *strides, *sizes[:7], n_index, parts, **{name: constants[name] for name in WALK},
        num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    return n_index, parts, dk, dv


def far_parts(index: Band | Listed, config: Config, length: int, pack: int) -> int:
    """Into how many parts the queries are cut that see sinks from beyond their window.

    A part is no longer than the walk of another tile of keys; 0 without sinks among the keys, or if all queries are no more.
    """
    if not isinstance(index, Band) or not index.sinks or index.front or index.past:
        return 0
    tokens = config.queries // pack
    tiles, others = -(-length // tokens), -(-(config.keys + index.window - 1) // tokens) + 1
    return -(-tiles // others) if tiles > others else 0


def _chosen(q: Tensor, k: Tensor, v: Tensor, index: Band | Listed) -> Configs:
    return configs(max(k.shape[3], v.shape[3]), _dot_dtype(q, k, v), listed=isinstance(index, Listed))


def _query_tiles(q: Tensor, k: Tensor, config: Config) -> int:
    """Programs that own a tile of queries."""
    batch, heads, length = q.shape[:3]
    pack = pack_of(heads // k.shape[1])
    return batch * heads // pack * -(-length * pack // config.queries)


def _sizes(q: Tensor, k: Tensor, index: Band | Listed) -> tuple[int, ...]:
    """The kernels' run-time integers."""
    group = q.shape[1] // k.shape[1]
    sizes = (q.shape[2], k.shape[2], k.shape[1], group, pack_of(group))
    if isinstance(index, Band):
        # a stored sink is at the front
        return *sizes, index.window, index.front or index.sinks, index.front, index.past, 1, 1, 1
    rows, _, n_words = index.words.shape
    return *sizes, 0, 0, 0, k.shape[2] - q.shape[2], n_words, index.block, rows


def _constants(
    q: Tensor, k: Tensor, v: Tensor, index: Band | Listed, start_B: Tensor | None, unit: int, config: Config
) -> dict[str, object]:
    """The kernels' compile-time arguments."""
    k_dim, v_dim, dot = k.shape[3], v.shape[3], _dot_dtype(q, k, v)
    listed = isinstance(index, Listed)
    flags = {
        "LISTED": listed,
        "SINKS": not listed and index.sinks > 0,
        "STORED": start_B is not None,
        "ROWWISE": listed and index.block % config.keys == 0,
    }
    tiles = {"BK": product_width(k_dim, dot), "BV": product_width(v_dim, dot), "UNIT": unit, "M": config.queries, "N": config.keys}
    types = {"DOT": _triton_dtype(dot), "PRECISION": _precision(dot), "STAGES": config.stages}
    return {"K": k_dim, "V": v_dim, **tiles, **flags, **types}


def _lists(index: Band | Listed, spare: Tensor, *, by_key: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Words, and for each tile of queries (or of keys) the tiles of keys (of queries) to visit, and how many."""
    if isinstance(index, Band):
        return spare, spare, spare
    from kernels.indexed import indexed_triton

    flags = index.tiles.view(torch.uint8)
    flags = flags.transpose(1, 2) if by_key else flags
    n_index, inner, n_flags = flags.shape
    lists = flags.new_empty(n_index, inner, n_flags, dtype=torch.int32)
    counts = flags.new_empty(n_index, inner, dtype=torch.int32)
    indexed_triton.compact_kernel[(n_index * inner,)](
        flags, lists, counts, n_index * inner, inner, n_flags, *flags.stride(), BLOCK=FLAGS_AT_ONCE, num_warps=1
    )
    return index.words.contiguous(), lists, counts
