"""One token's softmax attention to a cache as a torch operator: launch, fake tensors and vmap; it has no gradient.

Shape legend: B batch, H heads of q, G heads of k and v, S keys, K width of q and k, V width of v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._members import fold_members
from kernels.operands import _dot_dtype, _precision, _rows, _triton_dtype, padded

MAX_PARTS = 32
PROGRAMS = 264
"""Programs that fill the multiprocessors twice; a cache is split until there are as many."""
KEYS = {64: (64, 4, 3), 128: (64, 4, 2), 256: (32, 4, 2)}
"""By the larger of the widths of k and v: keys of a tile, warps and stages for 16-bit operands; fp32 has half the keys."""


@torch.library.custom_op("mixer_bench::decode_attention", mutates_args=())
def decode_attention_operator(q_BHK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, seen_BGS: Tensor) -> Tensor:
    """`kernels.indexed_attention.decode_attention` for a mask [B, G or 1, S]."""
    from kernels.indexed import indexed_decode_triton

    with torch.cuda.device_of(q_BHK):  # Triton launches on the current device
        batch, heads, k_dim = q_BHK.shape
        kv_heads, n_keys, v_dim = v_BGSV.shape[1:]
        group = heads // kv_heads
        rows = min(64, padded(group))
        (q, k, v), strides, unit = _rows(q_BHK[:, :, None], k_BGSK, v_BGSV)
        dot = _dot_dtype(q, k, v)
        keys, warps, stages = next(config for limit, config in KEYS.items() if max(k_dim, v_dim) <= limit)
        keys, stages = (keys // 2, 1) if dot == torch.float32 else (keys, stages)
        bundles = batch * kv_heads * -(-group // rows)
        parts = max(1, min(MAX_PARTS, -(-PROGRAMS // bundles), -(-n_keys // keys)))
        outputs, highest, totals = (q.new_empty(batch, heads, parts, *more, dtype=torch.float32) for more in ((v_dim,), (), ()))
        y = q.new_empty(batch, heads, v_dim)
        seen = seen_BGS.view(torch.uint8).contiguous()
        indexed_decode_triton.part_kernel[(bundles * parts,)](
            q, k, v, seen, outputs, highest, totals, strides[0], strides[1], *strides[3:],
            seen.stride(0), seen.stride(1) if seen.shape[1] > 1 else 0, n_keys, kv_heads, group, parts,
            K=k_dim, V=v_dim, BK=padded(k_dim), BV=padded(v_dim), UNIT=unit, M=rows, N=keys,
            DOT=_triton_dtype(dot), PRECISION=_precision(dot), STAGES=stages, num_warps=warps,
        )  # fmt: skip
        indexed_decode_triton.join_kernel[(batch * heads,)](
            outputs, highest, totals, y, parts, V=v_dim, BV=padded(v_dim), P=MAX_PARTS, num_warps=4
        )
        return y


@decode_attention_operator.register_fake
def _(q_BHK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, seen_BGS: Tensor) -> Tensor:
    return q_BHK.new_empty(*q_BHK.shape[:2], v_BGSV.shape[3])


@decode_attention_operator.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
    folded = [fold_members(x, axis, info.batch_size) for x, axis in zip(args, in_dims, strict=True)]
    return decode_attention_operator(*folded).unflatten(0, (info.batch_size, -1)), 0
