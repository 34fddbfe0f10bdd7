"""Launches the kernels of the recurrence with a decay per key channel on torch tensors: configurations and allocations.

Forward is `prepare_kernel` for all chunks, `solve_kernel` with the delta rule, and `walk_kernel` for outputs. Backward prepares
again, walks again for the states between chunks, walks in reverse, and ends with `gradient_kernel` for all chunks, so that
nothing but the inputs is kept.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width; KP and VP are padded widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.walk import _dot_dtype, _nothing, _precision, _rows, _state_like, _triton_dtype, padded


class Tile(NamedTuple):
    """How one kernel is compiled.

    Args:
        width: channels or values that a program takes at once.
        warps: warps of a program.
        stages: depth of its software pipeline.
        registers: most registers of a thread, or None for the compiler's choice.
    """

    width: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """Launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


class Config(NamedTuple):
    """How the kernels are compiled.

    Args:
        chunk: tokens of a chunk.
        prepare: of the preparation.
        solve: of the triangular systems.
        walk: of both walks; the width is that of the state's columns.
        pairs: of the gradients of scores.
        gradient: of those of queries and keys.
    """

    chunk: int
    prepare: Tile
    solve: Tile
    walk: Tile
    pairs: Tile
    gradient: Tile


# By the widest of K and V (the first at least as large counts), for 16-bit and for fp32 operands.
SIXTEEN_BIT = {
    64: Config(64, Tile(64, 4, 1), Tile(64, 4, 1), Tile(64, 4, 2), Tile(64, 4, 1), Tile(64, 8, 1)),
    128: Config(64, Tile(64, 4, 1), Tile(64, 4, 1), Tile(64, 4, 2), Tile(64, 4, 1), Tile(64, 8, 1)),
    256: Config(64, Tile(64, 4, 1), Tile(64, 4, 1), Tile(64, 8, 1), Tile(64, 4, 1), Tile(64, 8, 1)),
}
FP32 = {
    64: Config(16, Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1)),
    128: Config(16, Tile(32, 4, 1), Tile(32, 4, 1), Tile(16, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1)),
    256: Config(16, Tile(32, 4, 1), Tile(32, 4, 1), Tile(16, 8, 1), Tile(32, 4, 1), Tile(32, 4, 1)),
}


def config(k_dim: int, v_dim: int, dtype: torch.dtype) -> Config:
    """The shipped configuration."""
    table = FP32 if dtype == torch.float32 else SIXTEEN_BIT
    return next(found for limit, found in table.items() if max(k_dim, v_dim) <= limit)


def tile_width(width: int, dtype: torch.dtype) -> int:
    """The width that tiles have on chip: a power of two, in 16 bit at least 64.

    Narrower tiles ended in illegal memory accesses with ptxas 12.8, which Triton 3.6 ships (its issues 10486 and 11366).
    """
    return max(padded(width), 16 if dtype == torch.float32 else 64)


def solve_precision(dtype: torch.dtype) -> str:
    """Products of the triangular inverse: TF32 has the mantissa of fp16 and the range that keys of any length need."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def gentle_limit(dtype: torch.dtype) -> float:
    """Exponent of 2 up to which the middle of a chunk serves all its tokens; factors in fp16 would overflow early."""
    return 0.0 if dtype == torch.float16 else 60.0


def gate_terms(dtype: torch.dtype, gate_dtype: torch.dtype) -> int:
    """How many bf16 terms stand for a log decay in its sums: 2^-17 of it is lost with two; 0 for sums in fp32."""
    if dtype == torch.float32:
        return 0
    return 1 if gate_dtype == torch.bfloat16 else 2


class Prepared(NamedTuple):
    """What `prepare_kernel` and `solve_kernel` write; see there."""

    reads: Tensor
    writes: Tensor
    carry: Tensor
    scores: Tensor
    erases: Tensor
    targets: Tensor
    inverses: Tensor


class Call:
    """The arguments that the kernels of one call share.

    Args:
        q_BTHK: queries.
        k_BTHK: keys.
        v_BTHV: values.
        log_decay_BTHK: log decays.
        beta_BTH: write strengths of the delta rule, or None.
        erase_BTHK: keys of the erasure, or None for those of the writes.
        state_BHKV: S_0 in fp32, or None.
    """

    def __init__(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_decay_BTHK: Tensor,
        beta_BTH: Tensor | None,
        erase_BTHK: Tensor | None,
        state_BHKV: Tensor | None,
    ) -> None:
        self.q, self.k, self.gate, self.erase = q_BTHK, k_BTHK, log_decay_BTHK, erase_BTHK
        self.batch, self.length, self.heads, self.v_dim = v_BTHV.shape
        self.k_dim = k_BTHK.shape[3]
        self.v, self.beta = v_BTHV, v_BTHV if beta_BTH is None else beta_BTH.contiguous()
        self.first = v_BTHV if state_BHKV is None else state_BHKV.contiguous()
        self.has_first, self.delta = state_BHKV is not None, beta_BTH is not None
        self.dtype = _dot_dtype(q_BTHK, k_BTHK, v_BTHV)
        self.config = config(self.k_dim, self.v_dim, self.dtype)
        self.chunks = -(-self.length // self.config.chunk)
        self.blocks = self.batch * self.heads * self.chunks
        self.levels = self.config.chunk.bit_length() - 1
        self.wide_k, self.wide_v = (tile_width(width, self.dtype) for width in (self.k_dim, self.v_dim))
        self.tile = min(self.config.walk.width, self.wide_v)
        self.tiles = -(-self.v_dim // self.tile)
        self.flags = {
            "K": self.k_dim, "KP": self.wide_k, "C": self.config.chunk, "DOT": _triton_dtype(self.dtype),
            "PRECISION": _precision(self.dtype),
        }  # fmt: skip
        self.tree_flags = {
            "OWN": self.erase is not None,
            "LEVELS": self.levels,
            "GENTLE": gentle_limit(self.dtype),
            "TERMS": gate_terms(self.dtype, log_decay_BTHK.dtype),
        }

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Fresh memory in the dtype of the tensor cores, or another one."""
        return self.v.new_empty(shape, dtype=dtype or self.dtype)

    def prepare(self, *, save: bool) -> Prepared:
        """Runs `prepare_kernel`, and with the delta rule `solve_kernel`; the inverses are written if `save`."""
        from kernels.vector_gate_prepare import prepare_kernel

        chunk, wide, tile = self.config.chunk, self.wide_k, self.config.prepare
        rows, square = (self.blocks, chunk, wide), (self.blocks, chunk, chunk)
        reads, writes = self.scratch(*rows), self.scratch(*rows)
        carry = self.scratch(self.blocks, wide, dtype=torch.float32)
        scores, erases = self.scratch(*square), self.scratch(*rows if self.delta else (0,))
        inner = self.scratch(*square if self.delta else (0,), dtype=torch.float32)
        (q, k, f, gate), strides, unit = _rows(self.q, self.k, self.k if self.erase is None else self.erase, self.gate)
        prepare_kernel[(self.blocks,)](
            q, k, f, gate, reads, writes, carry, scores, erases, inner, *strides, self.length, self.heads,
            **self.flags, **self.tree_flags, DELTA=self.delta, BK=min(tile.width, wide), UNIT=unit, **tile.options(),
        )  # fmt: skip
        targets, inverses = self._solve(inner, erases, save=save) if self.delta else (self.v, inner)
        return Prepared(reads, writes, carry, scores, erases, targets, inverses)

    def _solve(self, inner: Tensor, erases: Tensor, *, save: bool) -> tuple[Tensor, Tensor]:
        """Runs `solve_kernel`: targets and inverses; erases change in place."""
        from kernels.vector_gate_solve import solve_kernel

        tile = self.config.solve
        targets, inverses = self.scratch(*self.v.shape), self.scratch(*inner.shape if save else (0,))
        (v,), strides, unit = _rows(self.v)
        solve_kernel[(self.blocks,)](
            inner, self.beta, v, erases, targets, inverses, *strides, self.length, self.heads, **self.flags,
            V=self.v_dim, BK=min(tile.width, self.wide_k), BV=min(tile.width, self.wide_v), UNIT=unit, LEVELS=self.levels,
            SAVE=save, SOLVE=solve_precision(self.dtype), **tile.options(),
        )  # fmt: skip
        return targets, inverses

    def walk(self, made: Prepared, *, out: bool, return_state: bool) -> tuple[Tensor, ...]:
        """Runs `walk_kernel`: outputs and the final state, or states between chunks and errors."""
        from kernels.vector_gate_walk import walk_kernel

        (v,), strides, unit = _rows(made.targets)
        o = torch.empty_like(self.v, memory_format=torch.contiguous_format) if out else v
        last = _state_like(self.v, self.k_dim) if return_state else _nothing(self.v)
        states = self.scratch(*(0,) if out else (self.blocks, self.wide_k, self.wide_v))
        errors = v if out or not self.delta else self.scratch(*self.v.shape)
        walk_kernel[(self.batch * self.heads * self.tiles,)](
            made.reads, made.writes, made.carry, made.scores, made.erases, v, self.beta, self.first, o, last, states, errors,
            *strides, self.length, self.heads, **self.flags,
            DELTA=self.delta, V=self.v_dim, VP=self.wide_v, BV=self.tile, UNIT=unit, FIRST=self.has_first,
            LAST=return_state, OUT=out, STAGES=self.config.walk.stages, **self.config.walk.options(),
        )  # fmt: skip
        return (o, last) if out else (states, errors)

    def reverse(self, made: Prepared, errors: Tensor, do: Tensor, dlast: Tensor | None) -> tuple[Tensor, ...]:
        """Runs `reverse_kernel`: gradients of v, of beta in tiles, of the first state, and of the states between chunks."""
        from kernels.vector_gate_walk import reverse_kernel

        (do,), strides, unit = _rows(do)
        dv = torch.empty_like(self.v, memory_format=torch.contiguous_format)
        dbeta = self.scratch(*(self.tiles, *self.v.shape[:3]) if self.delta else (0,), dtype=torch.float32)
        dfirst = _state_like(self.v, self.k_dim) if self.has_first else _nothing(self.v)
        dstates = self.scratch(self.blocks, self.wide_k, self.wide_v)
        reverse_kernel[(self.batch * self.heads * self.tiles,)](
            made.reads, made.writes, made.carry, made.scores, made.erases, made.inverses, errors, self.beta, do,
            do if dlast is None else dlast.float().contiguous(), dv, dbeta, dfirst, dstates,
            *strides, self.length, self.batch, self.heads, **self.flags,
            DELTA=self.delta, V=self.v_dim, VP=self.wide_v, BV=self.tile, UNIT=unit, FIRST=self.has_first, DLAST=dlast is not None,
            STAGES=self.config.walk.stages, **self.config.walk.options(),
        )  # fmt: skip
        return dv, dbeta, dfirst, dstates

    def gradients(self, errors: Tensor, do: Tensor, dv: Tensor, states: Tensor, dstates: Tensor) -> tuple[Tensor, ...]:
        """Runs `gradient_kernel`: gradients of q, k, the keys of the erasure and the log decays."""
        from kernels.vector_gate_gradient import gradient_kernel

        inputs = (self.q, self.k, self.erase, self.gate)
        found = tuple(_nothing(self.v) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        erase = self.k if self.erase is None else self.erase
        (q, k, u, f, gate, do), strides, unit = _rows(self.q, self.k, errors, erase, self.gate, do)
        dscores, dinner = self._pairs(errors, do, dv)
        tile = self.config.gradient
        part_k, part_v = min(tile.width, self.wide_k), min(tile.width, self.wide_v)
        gradient_kernel[(self.blocks * (self.wide_k // part_k),)](
            q, k, u, f, gate, self.beta, do, dv, states, dstates, dscores, dinner, *found,
            *strides, self.length, self.heads, **self.flags,
            **self.tree_flags, DELTA=self.delta, V=self.v_dim, VP=self.wide_v, BK=part_k, BV=part_v, UNIT=unit, **tile.options(),
        )  # fmt: skip
        return found

    def _pairs(self, errors: Tensor, do: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """Runs `pairs_kernel`: gradients of P and M."""
        from kernels.vector_gate_pairs import pairs_kernel

        tile, square = self.config.pairs, (self.blocks, self.config.chunk, self.config.chunk)
        dscores, dinner = self.scratch(*square), self.scratch(*square if self.delta else (0,))
        (u, do), strides, unit = _rows(errors, do)
        pairs_kernel[(self.blocks,)](
            u, self.beta, do, dv, dscores, dinner, *strides, self.length, self.heads,
            V=self.v_dim, BV=min(tile.width, self.wide_v), UNIT=unit, C=self.config.chunk, DELTA=self.delta,
            DOT=self.flags["DOT"], PRECISION=self.flags["PRECISION"], **tile.options(),
        )  # fmt: skip
        return dscores, dinner


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    beta_BTH: Tensor | None,
    erase_BTHK: Tensor | None,
    state_BHKV: Tensor | None,
    *,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `kernels.reference` with a vector decay.

    Args:
        q_BTHK: queries.
        k_BTHK: keys.
        v_BTHV: values.
        log_decay_BTHK: natural log of the decays, <= 0.
        beta_BTH: write strengths of the delta rule, or None for no erasure and unit writes.
        erase_BTHK: with beta, keys f of the erasure, which then reads before the decay of its own token,
            S_t = Diag(decay_t) S_{t-1} + beta_t k_t (v_t - S_{t-1}^T f_t)^T; None for the delta rule itself.
        state_BHKV: S_0 in fp32, or None for zero.
        return_state: whether the final state is wanted.

    Returns:
        The outputs [B, T, H, V] in the dtype of v, and the final state [B, H, K, V] in fp32, or an empty tensor.
    """
    call = Call(q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, beta_BTH, erase_BTHK, state_BHKV)
    o, last = call.walk(call.prepare(save=False), out=True, return_state=return_state)
    return o, last


def backward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    beta_BTH: Tensor | None,
    erase_BTHK: Tensor | None,
    state_BHKV: Tensor | None,
    do_BTHV: Tensor,
    dfinal_BHKV: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of `forward`.

    Args:
        q_BTHK: as for `forward`, and so are k, v, log_decay, beta, erase and state.
        k_BTHK: keys.
        v_BTHV: values.
        log_decay_BTHK: log decays.
        beta_BTH: write strengths.
        erase_BTHK: keys of the erasure.
        state_BHKV: S_0.
        do_BTHV: gradient of the outputs.
        dfinal_BHKV: gradient of the final state, or None for zero.

    Returns:
        Gradients of q, k, v, log_decay, beta, erase and state in their dtypes, empty where those are None.
    """
    call = Call(q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, beta_BTH, erase_BTHK, state_BHKV)
    made = call.prepare(save=True)
    states, errors = call.walk(made, out=False, return_state=False)
    dv, dbeta, dfirst, dstates = call.reverse(made, errors, do_BTHV, dfinal_BHKV)
    dq, dk, derase, dgate = call.gradients(errors, do_BTHV, dv, states, dstates)
    return dq, dk, dv, dgate, _nothing(v_BTHV) if beta_BTH is None else dbeta.sum(0).to(beta_BTH.dtype), derase, dfirst
