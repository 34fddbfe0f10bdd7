"""One decoded token of a window whose keys compete for room when they leave it, in one launch: attention, and storage moved on.

Every key has a score. A key that leaves the window joins the kept ones in the place of the lowest of them, unless its own score
is lower still; of equal scores the newer key stays. The torch form below is the definition.

Shape legend: B batch, H heads of q, G heads of k and v (G divides H), L stored keys, S sinks, P kept keys, K width of q and k,
V width of v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels._arguments import check_arguments, check_rank
from kernels.indexed_attention import decode_attention
from kernels.operands import _dot_dtype, _precision, _triton_dtype, padded
from kernels.step import may_write
from kernels.values import check_values, is_checking
from kernels.window_step import Stored, check_window, tile_of, window_obstacle

OPERATION = "kept_step"
MAX_KEPT = 2048
"""Kept keys of a head that one program walks."""


class Kept(NamedTuple):
    """What a window that keeps keys holds beside `Stored`.

    Args:
        k_BGPK: kept keys in order of age.
        v_BGPV: values.
        score_BGP: fp32, minus infinity where nothing is kept yet.
        near_score_BGL: fp32, scores of the window's stored keys.
    """

    k_BGPK: Tensor
    v_BGPV: Tensor
    score_BGP: Tensor
    near_score_BGL: Tensor


def kept_step(
    q_BHK: Tensor, k_BGK: Tensor, v_BGV: Tensor, score_BG: Tensor, stored: Stored, kept: Kept
) -> tuple[Tensor, Stored, Kept]:
    """One token's attention to the window, the sinks and the kept keys; then its oldest key may be kept.

    There is no gradient.

    Args:
        q_BHK: query.
        k_BGK: key.
        v_BGV: value.
        score_BG: the key's score.
        stored: the window and the sinks, which never compete; the window is one key longer than what it stores.
        kept: the kept keys, and the window's scores.

    Returns:
        The output [B, H, V] in the dtype of q, and the new storage: new tensors, or inside `kernels.step.states_in_place` the
        given ones, written over.

    Raises:
        ValueError: shapes or devices do not match.
    """
    check_window(q_BHK, k_BGK, v_BGV, stored)
    _check(k_BGK, v_BGV, score_BG, stored, kept)
    obstacle = window_obstacle(q_BHK, k_BGK, v_BGV, stored) or _obstacle(stored, kept)
    if dispatch.pick(OPERATION, q_BHK, obstacle=obstacle) != "triton":
        y, new_stored, new_kept = _torch_step(q_BHK, k_BGK, v_BGV, score_BG, stored, kept)
        if not may_write():
            return y, new_stored, new_kept
        for old, x in zip((*stored, *kept), (*new_stored, *new_kept), strict=True):
            if old is not None and x is not None:
                old.copy_(x)
        return y, stored, kept
    if not may_write() or not all(x is None or x.is_contiguous() for x in (*stored, *kept)):
        dense = torch.contiguous_format
        stored = Stored(*(None if x is None else x.clone(memory_format=dense) for x in stored))
        kept = Kept(*(x.clone(memory_format=dense) for x in kept))
    return kept_step_in_place(q_BHK, k_BGK, v_BGV, score_BG, *stored, *kept), stored, kept


def _obstacle(stored: Stored, kept: Kept) -> str | None:
    """What keeps a token from the kernel."""
    if stored.k_BGLK.shape[2] == 0:
        return "a window of one key stores none"
    if (room := kept.k_BGPK.shape[2]) > MAX_KEPT:
        return f"{room} kept keys are above {MAX_KEPT}"
    return None


def _torch_step(q: Tensor, k: Tensor, v: Tensor, score: Tensor, stored: Stored, kept: Kept) -> tuple[Tensor, Stored, Kept]:
    length, position, groups = stored.k_BGLK.shape[2], stored.position_B, k.shape[1]
    sinks = 0 if stored.sink_k_BGPK is None else stored.sink_k_BGPK.shape[2]
    sink_S, near_N = torch.arange(sinks, device=q.device), torch.arange(length + 1, device=q.device)
    own_BGSE = (sink_S == position[:, None])[:, None, :, None]
    near_BN = position[:, None] - length + near_N
    seen = [
        (position[:, None] - sink_S > length)[:, None].expand(-1, groups, -1),
        kept.score_BGP > float("-inf"),
        (near_BN >= 0)[:, None].expand(-1, groups, -1),
    ]
    near_score = torch.cat((kept.near_score_BGL, score[:, :, None]), 2)
    leaving = near_score[:, :, :1].masked_fill((near_BN[:, :1] < sinks)[:, None], float("-inf"))
    candidates = torch.cat((kept.score_BGP, leaving), 2)
    # The first of the lowest is the oldest; where all are lower than the key that leaves, that one is the last and goes itself.
    goes = candidates.argmin(2, keepdim=True)
    stays = torch.arange(candidates.shape[2] - 1, device=q.device)
    stays = stays + (stays >= goes)
    held, new_near, new_sinks, new_kept = [], [], [], []
    for old, sink, room, x in ((stored[0], stored[3], kept[0], k), (stored[1], stored[4], kept[1], v)):
        near = torch.cat((old, x[:, :, None].to(old.dtype)), 2)
        filled = None if sink is None else torch.where(own_BGSE, x[:, :, None].to(sink.dtype), sink)
        held.append(torch.cat([part.to(q.dtype) for part in (filled, room, near) if part is not None], 2))
        rows = stays[..., None].expand(*stays.shape, x.shape[-1])
        new_kept.append(torch.cat((room, near[:, :, :1]), 2).gather(2, rows))
        new_near.append(near[:, :, 1:])
        new_sinks.append(filled)
    y = decode_attention(q, *held, torch.cat(seen, 2))
    new_kept += [candidates.gather(2, stays), near_score[:, :, 1:]]
    return y, Stored(*new_near, position + 1, *new_sinks), Kept(*new_kept)


def _check(k: Tensor, v: Tensor, score: Tensor, stored: Stored, kept: Kept) -> None:
    check_rank("kept k", kept.k_BGPK, "B heads kept width")
    sizes, room = k.shape[:2], kept.k_BGPK.shape[2]
    expected = {
        "score": (score, sizes),
        "kept k": (kept.k_BGPK, (*sizes, room, k.shape[2])),
        "kept v": (kept.v_BGPV, (*sizes, room, v.shape[2])),
        "near score": (kept.near_score_BGL, (*sizes, stored.k_BGLK.shape[2])),
    }
    check_arguments(k, expected, first="k", dtypes=dict.fromkeys(("score", "near score"), (torch.float32,)))
    # Minus infinity, that of a place that is free, is a value that these may have.
    kept_score = {"kept score": (kept.score_BGP, (*sizes, room))}
    check_arguments(k, kept_score, first="k", dtypes={"kept score": (torch.float32,)}, values=False)
    if is_checking():
        check_values("kept score", kept.score_BGP.masked_fill(kept.score_BGP == -torch.inf, 0.0))


@torch.library.custom_op(
    "mixer_bench::kept_step_",
    mutates_args=("old_k", "old_v", "position", "sink_k", "sink_v", "kept_k", "kept_v", "kept_score", "near_score"),
)
def kept_step_in_place(
    q: Tensor, k: Tensor, v: Tensor, score: Tensor, old_k: Tensor, old_v: Tensor, position: Tensor, sink_k: Tensor | None,
    sink_v: Tensor | None, kept_k: Tensor, kept_v: Tensor, kept_score: Tensor, near_score: Tensor,
) -> Tensor:  # fmt: skip
    """`kept_step` on dense storage that is written over; returns the output."""
    from kernels.steps.kept_step_triton import kept_step_kernel

    q, k, v = (x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in (q, k, v))
    groups, k_dim, v_dim, room, length = k.shape[1], k.shape[2], v.shape[2], kept_k.shape[2], old_k.shape[2]
    group, sinks = q.shape[1] // groups, 0 if sink_k is None else sink_k.shape[2]
    y, dot = q.new_empty(*q.shape[:2], v_dim), _dot_dtype(q, k, v)
    keys, warps = tile_of(max(k_dim, v_dim), dot)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kept_step_kernel[(len(q) * groups,)](
            q, k, v, score.contiguous(), old_k, old_v, k if sink_k is None else sink_k, v if sink_v is None else sink_v,
            kept_k, kept_v, kept_score, near_score, position, y,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], groups, group, length, sinks, room,
            K=k_dim, V=v_dim, BK=padded(k_dim), BV=padded(v_dim), M=padded(group), N=keys, BS=padded(sinks) if sinks else 0,
            BP=padded(room), BL=padded(length), DOT=_triton_dtype(dot), PRECISION=_precision(dot), num_warps=warps,
        )  # fmt: skip
    position += 1
    return y


@kept_step_in_place.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[2])
