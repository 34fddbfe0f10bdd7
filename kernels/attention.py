"""Softmax attention on plain tensors: dense, under a boolean mask, and in a band with sinks.

`attention_reference` is the definition; `attention` and `banded_attention` are the fast forms and equal it.

Shape legend: B batch, H heads of q, G heads of k and v, T queries, S keys, K key width, V value width, N blocks,
C block length, X = B H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels._arguments import INTEGERS, check_arguments, check_axes, check_rank
from kernels._members import fold_members, stack_members
from kernels.walks.walk import MAX_WIDTH


def attention_reference(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, mask_TS: Tensor | None = None) -> Tensor:
    """Softmax attention by its definition (Vaswani et al. 2017, eq. 1), scale K^-1/2.

    Args:
        q_BHTK: queries; any number of leading axes.
        k_BHSK: keys.
        v_BHSV: values.
        mask_TS: True where a query sees a key, broadcastable to [..., T, S]; every row sees something.

    Returns:
        [..., T, V].
    """
    scores = (q_BHTK * q_BHTK.shape[-1] ** -0.5) @ k_BHSK.mT
    if mask_TS is not None:
        scores = scores.masked_fill(~mask_TS, float("-inf"))
    return scores.softmax(-1) @ v_BHSV


def attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, mask_TS: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention through torch's fused kernels, under vmap as well.

    Args:
        q_BHTK: queries.
        k_BHSK: keys.
        v_BHSV: values.
        mask_TS: as in `attention_reference`; excludes `causal`.
        causal: query t sees keys 0..t; needs S = T.

    Returns:
        [B, H, T, V].
    """
    return torch.ops.mixer_bench.attention(q_BHTK, k_BHSK, v_BHSV, mask_TS, causal)


# A composite operator: autograd, autocast and torch.compile see through it to torch's own attention with its own choice of
# kernel. Only vmap stops at it, because torch's rule for the fused kernels is a loop on CPU and fails in fp32 on GPU.
_LIBRARY = torch.library.Library("mixer_bench", "FRAGMENT")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal) -> Tensor")


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _members_into_batch(
    info, in_dims: tuple[int | None, ...], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, int]:
    """The vmap rule: E members of B sequences are E B sequences of one call."""
    members = info.batch_size
    q, k, v = (fold_members(tensor, axis, members) for tensor, axis in zip((q, k, v), in_dims[:3], strict=True))
    batch = q.shape[0] // members
    if mask is not None:
        own = stack_members(mask, in_dims[3], members)
        own = own.reshape(members, *(1,) * (5 - own.dim()), *own.shape[1:])
        # a mask that all sequences share stays one mask
        mask = own[0] if in_dims[3] is None and own.shape[1] == 1 else own.expand(-1, batch, -1, -1, -1).flatten(0, 1)
    return torch.ops.mixer_bench.attention(q, k, v, mask, causal).unflatten(0, (members, batch)), 0


_LIBRARY.impl("attention", _attention, "CompositeImplicitAutograd")
torch.library.register_vmap("mixer_bench::attention", _members_into_batch, lib=_LIBRARY)


def band_mask(
    n_queries: int, n_keys: int, *, window: int | None = None, sinks: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Causal band with sinks, for queries at the end of the keys: the last query is at the last key's position.

    Args:
        n_queries: T.
        n_keys: S >= T.
        window: number of keys seen, the own one included; None for all.
        sinks: this many first keys are seen at any distance.

    Returns:
        [T, S], True where visible.
    """
    key_S = torch.arange(n_keys, device=device)
    distance_TS = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None] - key_S
    causal_TS = distance_TS >= 0
    if window is None:
        return causal_TS
    return causal_TS & ((distance_TS < window) | (key_S < sinks))


def banded_attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    *,
    window: int,
    start_B: Tensor | None = None,
    sink_kv: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal sliding-window attention with optional sinks, in O(T (window + sinks)) time and memory.

    Args:
        q_BHTK: queries of T consecutive tokens.
        k_BGSK: keys of the same tokens, after those of S - T earlier tokens, S - T < window; G divides H.
        v_BGSV: values.
        window: number of keys seen, the own one included.
        start_B: int64, absolute position of the first query in each sequence; None for 0. Keys at negative positions
            are unfilled storage and invisible.
        sink_kv: keys and values of the first s tokens of the sequence, each [B, G, s, .]; visible once they have left
            the window.

    Returns:
        [B, H, T, V].

    Raises:
        ValueError: tensors that do not belong together, or a forced backend that cannot run them.
    """
    _check_band(q_BHTK, k_BGSK, v_BGSV, window, start_B, sink_kv)
    n_tokens, n_heads = q_BHTK.shape[-2], q_BHTK.shape[1]
    whole = start_B is None and k_BGSK.shape[-2] == n_tokens
    if whole and window >= n_tokens:
        return attention(q_BHTK, *(share_heads(x.to(q_BHTK.dtype), n_heads) for x in (k_BGSK, v_BGSV)), causal=True)
    width = max(k_BGSK.shape[-1], v_BGSV.shape[-1])
    obstacle = f"head dim {width} is above {MAX_WIDTH}" if width > MAX_WIDTH else None
    backend = dispatch.pick("banded_attention", q_BHTK, obstacle=obstacle, tensor_cores=True)
    if start_B is None and not whole:
        start_B = torch.zeros(q_BHTK.shape[0], dtype=torch.long, device=q_BHTK.device)
    if backend == "triton":
        return _banded_by_triton(q_BHTK, k_BGSK, v_BGSV, window, start_B, sink_kv)
    k, v, *held = (share_heads(x.to(q_BHTK.dtype), n_heads) for x in (k_BGSK, v_BGSV, *(sink_kv or ())))
    sinks = (held[0], held[1]) if held else None
    if backend == "reference":
        return _banded_at_once(attention_reference, q_BHTK, k, v, window, start_B, sinks)
    return _banded_in_blocks(q_BHTK, k, v, window, start_B, sinks)


def _check_band(q: Tensor, k: Tensor, v: Tensor, window: int, start: Tensor | None, sinks: tuple[Tensor, Tensor] | None) -> None:
    """Refuses shapes, dtypes and devices that do not belong together, naming the argument."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_axes(name, x, "B heads T width")
    batch, heads, n_tokens, k_dim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    expected = {
        "k": (k, (batch, kv_heads, n_keys, k_dim)),
        "v": (v, (batch, kv_heads, n_keys, v.shape[3])),
        "start": (start, (batch,)),
    }
    if sinks is not None:
        check_rank("sink_kv[0]", sinks[0], "B heads sinks width")
        n_sinks = sinks[0].shape[-2]
        expected |= {
            f"sink_kv[{i}]": (x, (batch, kv_heads, n_sinks, of.shape[3]))
            for i, (x, of) in enumerate(zip(sinks, (k, v), strict=True))
        }
    check_arguments(q, expected, first="q", dtypes={"start": INTEGERS})
    if heads % kv_heads:
        raise ValueError(f"k has shape {tuple(k.shape)} and q {tuple(q.shape)}; k's heads divide q's")
    if window < 1 or n_keys < n_tokens:
        raise ValueError(
            f"window is {window} and k has {n_keys} keys for {n_tokens} queries; it takes at least 1, and a key a query"
        )


def share_heads(a_BGSK: Tensor, n_heads: int) -> Tensor:
    """Keys or values repeated for the H heads of q, each serving H / G neighbouring ones."""
    repeats = n_heads // a_BGSK.shape[1]
    return a_BGSK if repeats == 1 else a_BGSK.repeat_interleave(repeats, dim=1)


def _banded_by_triton(
    q: Tensor, k: Tensor, v: Tensor, window: int, start_B: Tensor | None, sinks: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Stored sinks become keys in front of all others; those of a whole sequence are keys already."""
    from kernels.indexed.indexed_op import indexed_attention

    n_sinks = 0 if sinks is None else sinks[0].shape[-2]
    front, past = (0, 0) if start_B is None else (n_sinks, k.shape[-2] - q.shape[-2])
    if front:
        k, v = torch.cat((sinks[0], k), -2), torch.cat((sinks[1], v), -2)
    return indexed_attention(q, k, v, start_B, None, "band", [window, n_sinks, front, past])[0]


def _banded_at_once(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    start_B: Tensor | None,
    sinks: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """All queries and keys under one mask."""
    n_tokens, history, n_sinks = q.shape[-2], k.shape[-2] - q.shape[-2], 0 if sinks is None else sinks[0].shape[-2]
    if start_B is None:  # a whole sequence holds its sinks already
        return attend(q, k, v, mask_TS=band_mask(n_tokens, n_tokens, window=window, sinks=n_sinks, device=q.device))
    if sinks is not None:
        k, v = torch.cat((sinks[0], k), -2), torch.cat((sinks[1], v), -2)
    return attend(q, k, v, mask_TS=_band_visible(n_tokens, history, window, start_B, n_sinks)[:, None])


def _banded_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int, start_B: Tensor | None, sinks: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Queries are cut into blocks at least as long as the window; a block sees itself, the block before and the sinks."""
    n_tokens, history, n_sinks = q.shape[-2], k.shape[-2] - q.shape[-2], 0 if sinks is None else sinks[0].shape[-2]
    block = max(window - 1, 32)
    if n_tokens <= 2 * block:
        return _banded_at_once(attention, q, k, v, window, start_B, sinks)
    n_blocks = -(-n_tokens // block)
    spare = n_blocks * block - n_tokens
    q_BHNCK = F.pad(q, (0, 0, 0, spare)).unflatten(-2, (n_blocks, block))
    k, v = (_block_pairs(F.pad(a, (0, 0, block - history, spare)), block) for a in (k, v))
    if sinks is not None:
        sink_k, sink_v = (a[:, :, None].expand(-1, -1, n_blocks, -1, -1) for a in sinks)
        k, v = torch.cat((sink_k, k), -2), torch.cat((sink_v, v), -2)
    start = torch.zeros((), dtype=torch.long, device=q.device) if start_B is None else start_B
    block_start = start[..., None] + torch.arange(0, n_blocks * block, block, device=q.device)
    mask = _band_visible(block, block, window, block_start, n_sinks)
    # heads join the batch and blocks take their place, so that a fused kernel meets ordinary sizes
    mask_XNCS = mask[None] if start_B is None else mask.repeat_interleave(q.shape[1], 0)
    y_XNCV = attention(q_BHNCK.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask_TS=mask_XNCS)
    return y_XNCV.unflatten(0, q.shape[:2]).flatten(-3, -2)[..., :n_tokens, :]


def _block_pairs(a_BHSK: Tensor, block: int) -> Tensor:
    """Cuts [B, H, (N + 1) C, K] into the N overlapping pairs of neighbouring blocks, [B, H, N, 2 C, K]."""
    blocks = a_BHSK.unflatten(-2, (-1, block))
    return torch.cat((blocks[:, :, :-1], blocks[:, :, 1:]), -2)


def _band_visible(n_queries: int, history: int, window: int, start: Tensor, n_sinks: int) -> Tensor:
    """Mask over (sinks, history, own keys) for queries from position `start` on; leading axes are those of `start`."""
    query_T = torch.arange(n_queries, device=start.device)
    key_S = torch.arange(-history, n_queries, device=start.device)
    distance_TS = query_T[:, None] - key_S
    filled = (start[..., None] + key_S >= 0)[..., None, :]
    band = (distance_TS >= 0) & (distance_TS < window) & filled
    if n_sinks == 0:
        return band
    sink_age = (start[..., None] + query_T)[..., None] - torch.arange(n_sinks, device=start.device)
    return torch.cat((sink_age >= window, band), -1)
