"""Softmax attention to some of the keys behind one door: a band, a static pattern, chosen blocks, or one token's cache.

Each function has three forms that `kernels.dispatch` chooses from: the definition under a dense mask, torch's fused attention
under the same mask (for a band: in blocks), and Triton kernels that visit only tiles with something to see.

Shape legend: B batch, H heads of q, G heads of k and v (G divides H), T queries, S keys, K width of q and k, V width of v,
N blocks of keys, R rows of an index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels._arguments import BOOLS, check_arguments, check_axes
from kernels.attention import attention, attention_reference, share_heads
from kernels.indexed.indexed_launch import list_tile
from kernels.indexed.sparse_index import option_names
from kernels.sparse_masks import MASKS
from kernels.values import check_most, check_seen, check_values, is_checking
from kernels.walks.walk import MAX_WIDTH


def sparse_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, *, pattern: str, **options: int) -> Tensor:
    """Attention under a static causal pattern.

    Args:
        q_BHTK: queries.
        k_BGTK: keys.
        v_BGTV: values.
        pattern: a key of `kernels.sparse_masks.MASKS`.
        options: the pattern's options.

    Returns:
        [B, H, T, V].

    Raises:
        ValueError: tensors that do not belong together, or a forced backend that cannot run them.
    """
    _check(q_BHTK, k_BGTK, v_BGTV)
    if pattern not in MASKS:
        raise ValueError(f"sparse_attention: there is no pattern {pattern!r}; there are {', '.join(MASKS)}")
    if set(options) != set(option_names(pattern)):
        wanted, given = ", ".join(option_names(pattern)), ", ".join(options) or "nothing"
        raise ValueError(f"sparse_attention: {pattern} takes {wanted}, not {given}")
    for name, number in options.items():
        if number < (least := int(name in ("window", "stride", "dilation"))):
            raise ValueError(f"sparse_attention: {name}={number}; it must be {least} or more")
    backend = dispatch.pick("sparse_attention", q_BHTK, obstacle=_width_obstacle(k_BGTK, v_BGTV), tensor_cores=True)
    if backend == "triton":
        from kernels.indexed.indexed_op import indexed_attention

        numbers = [options[name] for name in option_names(pattern)]
        return indexed_attention(q_BHTK, k_BGTK, v_BGTV, None, None, pattern, numbers)[0]
    position = torch.arange(q_BHTK.shape[2], device=q_BHTK.device)
    return _masked(backend, q_BHTK, k_BGTK, v_BGTV, MASKS[pattern](position[:, None], position, **options))


def block_attention(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, chosen_BGTN: Tensor, *, block: int, most: int | None = None
) -> Tensor:
    """Causal attention to the blocks of keys that each token chose.

    Args:
        q_BHTK: queries; the heads that share keys share the choice.
        k_BGTK: keys.
        v_BGTV: values.
        chosen_BGTN: bool, whether a token reads block n, keys n * block and on; every token sees something.
        block: keys of a block.
        most: blocks that a token chose at most, if that is known: gradients of few chosen out of many are made faster. Only the
            checked mode looks whether it is true.

    Returns:
        [B, H, T, V].

    Raises:
        ValueError: tensors that do not belong together, or a forced backend that cannot run them.
    """
    _check(q_BHTK, k_BGTK, v_BGTV)
    if block < 1:
        raise ValueError(f"block={block}; a block has at least one key")
    length = q_BHTK.shape[2]
    wanted = (*k_BGTK.shape[:2], length, -(-length // block))
    if tuple(chosen_BGTN.shape) != wanted:
        raise ValueError(f"chosen has the shape {list(chosen_BGTN.shape)}; with block={block} it must be {list(wanted)}")
    check_arguments(q_BHTK, {"chosen": (chosen_BGTN, wanted)}, first="q", dtypes={"chosen": BOOLS})
    most = _most(chosen_BGTN, most)
    if is_checking():
        position_T1 = torch.arange(length, device=chosen_BGTN.device)[:, None]
        check_seen("chosen", chosen_BGTN & (torch.arange(wanted[3], device=chosen_BGTN.device) <= position_T1 // block))
    obstacle = _width_obstacle(k_BGTK, v_BGTV)
    if obstacle is None:
        keys = list_tile(q_BHTK, k_BGTK, v_BGTV)[1]
        obstacle = f"block {block} neither divides {keys} nor is a multiple of it" if block % keys and keys % block else None
    backend = dispatch.pick("block_attention", q_BHTK, obstacle=obstacle, tensor_cores=True)
    if backend == "triton":
        from kernels.indexed.indexed_op import indexed_attention

        return indexed_attention(q_BHTK, k_BGTK, v_BGTV, None, chosen_BGTN.flatten(0, 1), "chosen", [block, most])[0]
    visible = chosen_BGTN.repeat_interleave(block, -1)[..., :length]
    visible = visible & torch.ones(length, length, dtype=torch.bool, device=visible.device).tril()
    return _masked(backend, q_BHTK, k_BGTK, v_BGTV, visible.repeat_interleave(q_BHTK.shape[1] // k_BGTK.shape[1], 1))


def _most(chosen: Tensor, most: int | None) -> int:
    """Blocks that a token chose at most, all of them if nobody said."""
    n_blocks = chosen.shape[3]
    if most is None:
        return n_blocks
    if most < 1:
        raise ValueError(f"most={most}: a token reads at least one block")
    if is_checking():
        check_most(chosen, most)
    return min(most, n_blocks)


def choose_blocks(q_BHTK: Tensor, mean_BGNK: Tensor, position: Tensor, *, block: int, top_k: int) -> Tensor:
    """Which blocks each token reads: its own one, and the best before it by the product of its query and their mean key.

    Args:
        q_BHTK: queries; heads that share keys choose by the sum of their products.
        mean_BGNK: mean key of each block.
        position: of the queries, broadcastable to [B, G, T].
        block: keys of a block.
        top_k: blocks chosen besides the own one.

    Returns:
        bool [B, G, T, N]; it carries no gradient.
    """
    q_BGTK = q_BHTK.detach().unflatten(1, (mean_BGNK.shape[1], -1)).sum(2)
    index, own = torch.arange(mean_BGNK.shape[2], device=q_BHTK.device), (position // block)[..., None]
    past = index < own
    scores = (q_BGTK @ mean_BGNK.mT).masked_fill(~past, float("-inf"))
    best = scores.topk(min(top_k, mean_BGNK.shape[2]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & past | (index == own)


def decode_attention(q_BHK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, seen_BGS: Tensor) -> Tensor:
    """Attention of one token to a cache, which several programs read at once.

    Args:
        q_BHK: the token's queries.
        k_BGSK: stored keys, in any floating dtype.
        v_BGSV: stored values.
        seen_BGS: bool, which keys the token sees, [B, G or 1, S]; something in every row. Unseen keys are not read.

    Returns:
        [B, H, V].

    Raises:
        ValueError: tensors that do not belong together, or a forced backend that cannot run them.
    """
    check_axes("q", q_BHK, "B H K")
    _check(q_BHK[:, :, None], k_BGSK, v_BGSV, cached=True)
    batch, kv_heads, n_keys = k_BGSK.shape[:3]
    rows = 1 if seen_BGS.shape[1:2] == (1,) else kv_heads
    check_arguments(k_BGSK, {"seen": (seen_BGS, (batch, rows, n_keys))}, first="k", dtypes={"seen": BOOLS}, values=False)
    if is_checking():
        check_seen("seen", seen_BGS)
        unseen = ~seen_BGS[..., None]  # storage that nobody has filled yet may hold anything
        for name, x in (("q", q_BHK), ("k", k_BGSK.masked_fill(unseen, 0)), ("v", v_BGSV.masked_fill(unseen, 0))):
            check_values(name, x)
    obstacle = _width_obstacle(k_BGSK, v_BGSV)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHK, k_BGSK, v_BGSV)):
        obstacle = "the kernel for one token has no gradient"
    backend = dispatch.pick("decode_attention", q_BHK, obstacle=obstacle, tensor_cores=True)
    if backend == "triton":
        from kernels.indexed.indexed_decode import decode_attention_operator

        return decode_attention_operator(q_BHK, k_BGSK, v_BGSV, seen_BGS)
    seen = seen_BGS if seen_BGS.shape[1] == 1 else seen_BGS.repeat_interleave(q_BHK.shape[1] // kv_heads, 1)
    return _masked(backend, q_BHK[:, :, None], k_BGSK, v_BGSV, seen[:, :, None])[:, :, 0]


def _width_obstacle(k: Tensor, v: Tensor) -> str | None:
    """What keeps widths from the Triton kernels."""
    width = max(k.shape[-1], v.shape[-1])
    return f"head dim {width} is above {MAX_WIDTH}" if width > MAX_WIDTH else None


def _masked(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (share_heads(x.to(q.dtype), q.shape[1]) for x in (k, v))
    return attention_reference(q, k, v, mask) if backend == "reference" else attention(q, k, v, mask_TS=mask)


def _check(q: Tensor, k: Tensor, v: Tensor, *, cached: bool = False) -> None:
    """Refuses shapes, dtypes and devices that do not belong together, naming the argument.

    `cached`: there are other keys than those of the queries' tokens, and the caller looks at values.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_axes(name, x, "B heads T width")
    batch, heads, length, k_dim = q.shape
    kv_heads, n_keys = k.shape[1], k.shape[2] if cached else length
    expected = {"k": (k, (batch, kv_heads, n_keys, k_dim)), "v": (v, (batch, kv_heads, n_keys, v.shape[3]))}
    check_arguments(q, expected, first="q", values=not cached)
    if heads % kv_heads:
        raise ValueError(f"k has shape {tuple(k.shape)} and q {tuple(q.shape)}; k's heads divide q's")
