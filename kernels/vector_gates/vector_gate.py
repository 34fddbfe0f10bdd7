"""Launches the kernels of the recurrence with a decay per key channel on torch tensors: strides and allocations.

Forward is `prepare_kernel` for all chunks and `walk_kernel`; backward `reverse_kernel`, and `gradient_kernel` for all chunks.
What the backward pass reads again is kept: scores and couplings, and the states and errors of the forward walk.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width; KP and VP are padded widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operands import _narrow, _nothing, _precision, _rows, _state_like, _triton_dtype
from kernels.vector_gates import vector_gate_hopper_launch
from kernels.vector_gates.vector_gate_config import PROGRAMS, SEGMENT, Tile, config, gate_terms, gentle_limit, tile_width
from kernels.vector_gates.vector_gate_kept import Kept, kept_in, kept_memory


class Segments(NamedTuple):
    """How many segments a head has, and of how many chunks each is."""

    number: int
    chunks: int


class Call:
    """The arguments that the kernels of one call share.

    Args:
        q_BTHK: queries.
        k_BTHK: keys.
        v_BTHV: values, or what has their shape and the dtype of the outputs.
        log_decay_BTHK: log decays.
        beta_BTH: write strengths of the delta rule, or None.
        erase_BTHK: keys of the erasure, or None for those of the writes.
        state_BHKV: S_0 in fp32, or None.
        kept: what the kernels pass on.
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
        kept: Kept,
    ) -> None:
        self.q, self.k, self.gate, self.erase, self.kept = q_BTHK, k_BTHK, log_decay_BTHK, erase_BTHK, kept
        self.batch, self.length, self.heads, self.v_dim = v_BTHV.shape
        self.beta = v_BTHV if beta_BTH is None else beta_BTH.contiguous()
        self.first = v_BTHV if state_BHKV is None else state_BHKV.contiguous()
        self.has_first, self.delta = state_BHKV is not None, beta_BTH is not None
        self.dtype, self.k_dim = kept.scores.dtype, k_BTHK.shape[3]
        self.config = config(self.k_dim, self.v_dim, self.dtype, delta=self.delta)
        self.blocks = kept.levels.numel()
        self.wide_k, self.wide_v = (tile_width(width, self.dtype) for width in (self.k_dim, self.v_dim))
        self.v = v_BTHV
        self.keys = (*_narrow(self.dtype, q_BTHK, k_BTHK, k_BTHK if erase_BTHK is None else erase_BTHK), log_decay_BTHK)
        self.flags = {
            "K": self.k_dim, "KP": self.wide_k, "C": self.config.chunk, "DELTA": self.delta, "DOT": _triton_dtype(self.dtype),
            "PRECISION": _precision(self.dtype),
        }  # fmt: skip
        self.gate_flags = {
            "OWN": erase_BTHK is not None,
            "TERMS": gate_terms(self.dtype, log_decay_BTHK.dtype),
            "LEVELS": self.config.chunk.bit_length() - 1,
        }

    def prepare(self) -> None:
        """Runs `prepare_kernel` and, with the delta rule, `solve_kernel`."""
        from kernels.vector_gates.vector_gate_prepare import prepare_kernel
        from kernels.vector_gates.vector_gate_solve import solve_kernel

        kept = self.kept
        rows, strides, unit = _rows(*self.keys)
        merge = (
            torch.float32 if self.dtype == torch.float32 else torch.float16
        )  # the digits of H, see `kernels.delta_rule.delta_coupling_triton`
        systems = torch.empty_like(kept.couplings, dtype=merge)
        for rough, tile in ((False, self.config.prepare), (True, self.config.rough)):
            prepare_kernel[(self.blocks,)](
                *rows, *kept[:6], systems, *strides, self.length, self.heads,
                **self.flags, **self.gate_flags, BK=min(tile.width, self.wide_k), UNIT=unit, GENTLE=gentle_limit(self.dtype),
                ROUGH=rough, **tile.options(),
            )  # fmt: skip
        if self.delta:
            solve_kernel[(self.blocks,)](
                self.beta, systems, kept.couplings, self.length, self.heads,
                C=self.config.chunk, MERGE=_triton_dtype(merge), PRECISION=_precision(self.dtype), num_warps=1,
            )  # fmt: skip

    def walk(self, *, return_state: bool, keep: bool) -> tuple[Tensor, Tensor]:
        """Runs `walk_kernel`: outputs and the final state."""
        from kernels.vector_gates.vector_gate_walk import walk_kernel

        kept, tile = self.kept, self.config.walk
        (v,), strides, unit = _rows(*_narrow(self.dtype, self.v))
        tiles, segments = self._tiles(tile), self._segments(tile)
        o = torch.empty_like(self.v, memory_format=torch.contiguous_format)
        last = _state_like(self.v, self.k_dim) if return_state else _nothing(self.v)

        if segments.number == 1 and vector_gate_hopper_launch.fit(self, v):
            vector_gate_hopper_launch.walk(self, v, o, last, return_state=return_state, keep=keep)
            return o, last

        def launch(first: Tensor, last: Tensor, decays: Tensor, **flags: bool) -> None:
            walk_kernel[(self.batch * self.heads * segments.number * tiles,)](
                *kept[1:7], v, self.beta, first, o, last, kept.states, kept.errors, decays,
                *strides, self.length, self.heads, *segments, **self.flags, **self._walking(tile), UNIT=unit, **flags,
            )  # fmt: skip

        first = self.first
        if segments.number > 1:
            first, decays = self._sums(segments.number)
            launch(self.first, first, decays, FIRST=False, LAST=False, KEEP=False, OUT=False)
            self._join(first, decays, self.first if self.has_first else None, reverse=False)
        launch(first, last, last, FIRST=self.has_first or segments.number > 1, LAST=return_state, KEEP=keep, OUT=True)
        return o, last

    def reverse(self, do: Tensor, dlast: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Runs `reverse_kernel`: gradients of v, of beta in tiles, of the first state, and of the states of chunks."""
        from kernels.vector_gates.vector_gate_walk import reverse_kernel

        kept, tile = self.kept, self.config.reverse
        (do,), strides, unit = _rows(*_narrow(self.dtype, do))
        tiles, segments = self._tiles(tile), self._segments(tile)
        dv = torch.empty_like(self.v, memory_format=torch.contiguous_format)
        dfirst = _state_like(self.v, self.k_dim) if self.has_first else _nothing(self.v)
        dstates = torch.empty_like(kept.states)
        given = None if dlast is None else dlast.float().contiguous()
        if segments.number == 1 and vector_gate_hopper_launch.fit(self, do):
            return dv, vector_gate_hopper_launch.reverse(self, do, given, dv, dfirst, dstates), dfirst, dstates
        dbeta = self.v.new_empty((tiles, *self.v.shape[:3]) if self.delta else 0, dtype=torch.float32)

        def launch(dlast: Tensor, dfirst: Tensor, decays: Tensor, **flags: bool) -> None:
            reverse_kernel[(self.batch * self.heads * segments.number * tiles,)](
                *kept[1:7], kept.errors, do, self.beta, dlast, dv, dbeta, dfirst, dstates, decays,
                *strides, self.length, self.batch, self.heads, *segments, **self.flags, **self._walking(tile), UNIT=unit, **flags,
            )  # fmt: skip

        behind = do if given is None else given
        if segments.number > 1:
            behind, decays = self._sums(segments.number)
            launch(do, behind, decays, FIRST=False, DLAST=False, OUT=False)
            self._join(behind, decays, given, reverse=True)
        launch(behind, dfirst, dfirst, FIRST=self.has_first, DLAST=given is not None or segments.number > 1, OUT=True)
        return dv, dbeta, dfirst, dstates

    def _walking(self, tile: Tile) -> dict[str, int | None]:
        """Compile-time arguments and options of a walk."""
        return {"V": self.v_dim, "VP": self.wide_v, "BV": min(tile.width, self.wide_v), "STAGES": tile.stages} | tile.options()

    def _tiles(self, tile: Tile) -> int:
        """Programs of a walk that share a head."""
        return -(-self.v_dim // min(tile.width, self.wide_v))

    def _segments(self, tile: Tile) -> Segments:
        """Into how much a walk of one head is split; two or three segments would not pay for the first walk."""
        chunks = self.blocks // (self.batch * self.heads)
        number = min(PROGRAMS // (self.batch * self.heads * self._tiles(tile)), chunks // SEGMENT)
        per = chunks if self.delta or number < 4 else -(-chunks // number)
        return Segments(-(-chunks // per), per)

    def _sums(self, segments: int) -> tuple[Tensor, Tensor]:
        """Memory for what segments add to a state, and their decays."""
        heads = (self.batch, self.heads, segments)
        return tuple(self.v.new_empty(*heads, *more, dtype=torch.float32) for more in ((self.k_dim, self.v_dim), (self.wide_k,)))

    def _join(self, sums: Tensor, decays: Tensor, first: Tensor | None, *, reverse: bool) -> None:
        """Runs `join_kernel`."""
        from kernels.vector_gates.vector_gate_walk import join_kernel

        block = 1024
        join_kernel[(self.batch * self.heads * -(-self.k_dim * self.v_dim // block),)](
            sums, decays, sums if first is None else first, sums.shape[2],
            K=self.k_dim, V=self.v_dim, KP=self.wide_k, BLOCK=block, FIRST=first is not None, REVERSE=reverse, num_warps=4,
        )  # fmt: skip

    def gradients(self, do: Tensor, dv: Tensor, dstates: Tensor) -> tuple[Tensor, ...]:
        """Runs `gradient_kernel`: gradients of q, k, the keys of the erasure and the log decays."""
        from kernels.vector_gates.vector_gate_gradient import gradient_kernel

        inputs = (self.q, self.k, self.erase, self.gate)
        found = tuple(_nothing(self.v) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        kept = self.kept
        rows, strides, unit = _rows(*self.keys, *_narrow(self.dtype, kept.errors if self.delta else self.v, do))
        for rough, tile in ((False, self.config.gradient), (True, self.config.rough)):
            part_k = min(tile.width, self.wide_k)
            gradient_kernel[(self.blocks * (self.wide_k // part_k),)](
                *rows, self.beta, dv, *kept[:5], kept.states, dstates, *found, *strides, self.length, self.heads,
                **self.flags, **self.gate_flags, V=self.v_dim, VP=self.wide_v, BK=part_k, BV=min(tile.width, self.wide_v),
                UNIT=unit, SPLIT=0 if self.dtype == torch.float32 else 2, ROUGH=rough, STAGES=tile.stages, **tile.options(),
            )  # fmt: skip
        return found


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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of `kernels.reference` with a vector decay.

    Args:
        q_BTHK: queries.
        k_BTHK: keys.
        v_BTHV: values.
        log_decay_BTHK: natural log of the decays, <= 0.
        beta_BTH: write strengths, or None for no erasure and unit writes.
        erase_BTHK: with beta, keys f of the erasure, which then reads before the decay of its own token,
            S_t = Diag(decay_t) S_{t-1} + beta_t k_t (v_t - S_{t-1}^T f_t)^T; None for the delta rule itself.
        state_BHKV: S_0 in fp32, or None for zero.
        return_state: whether the final state is wanted.
        keep: whether `backward` will run.

    Returns:
        The outputs [B, T, H, V] in the dtype of v, the final state [B, H, K, V] in fp32 or an empty tensor, and the memory of
        what `backward` needs.
    """
    flags = {"delta": beta_BTH is not None, "keep": keep}
    memory = kept_memory(q_BTHK, k_BTHK, v_BTHV, **flags)
    kept = kept_in(memory, q_BTHK, k_BTHK, v_BTHV, **flags)
    call = Call(q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, beta_BTH, erase_BTHK, state_BHKV, kept)
    call.prepare()
    return *call.walk(return_state=return_state, keep=keep), memory


def backward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    beta_BTH: Tensor | None,
    erase_BTHK: Tensor | None,
    state_BHKV: Tensor | None,
    memory: Tensor,
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
        memory: of what `forward` kept.
        do_BTHV: gradient of the outputs.
        dfinal_BHKV: gradient of the final state, or None for zero.

    Returns:
        Gradients of q, k, v, log_decay, beta, erase and state in their dtypes, empty where those are None.
    """
    kept = kept_in(memory, q_BTHK, k_BTHK, v_BTHV, delta=beta_BTH is not None, keep=True)
    call = Call(q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, beta_BTH, erase_BTHK, state_BHKV, kept)
    dv, dbeta, dfirst, dstates = call.reverse(do_BTHV, dfinal_BHKV)
    dq, dk, derase, dgate = call.gradients(do_BTHV, dv, dstates)
    if beta_BTH is not None:
        dbeta = (dbeta.sum(0) if len(dbeta) > 1 else dbeta[0]).to(beta_BTH.dtype)
    return dq, dk, dv, dgate, dbeta, derase, dfirst
