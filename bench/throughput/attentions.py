"""Softmax attention as problems: over everything, a window, or chosen blocks.

Shape legend: B batch, T length, H heads of q, G heads of k and v, K key, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from bench.throughput import bounds
from bench.throughput.bounds import Cost, Shape
from bench.throughput.draws import Draw, learned_in
from bench.throughput.problem import TOLERANCES, Problem, Tensors, precision_of
from kernels.attention import attention, attention_reference, band_mask, banded_attention, share_heads
from kernels.indexed_attention import block_attention, choose_blocks, decode_attention


@dataclass(frozen=True)
class Attention:
    """Causal softmax attention, over everything or a window."""

    window: int | None = None

    def cost(self, shape: Shape, mode: str, item: int) -> Cost:
        """See `bench.throughput.bounds`."""
        pairs = self._kept(shape) if mode == "decode" else bounds.visible_pairs(shape.length, self.window)
        return bounds.attention(shape, mode, item=item, pairs=pairs)

    def state_bytes(self, shape: Shape, item: int) -> int:
        """Keys and values of one sequence."""
        return self._kept(shape) * shape.groups * (shape.key + shape.value) * item

    def _kept(self, shape: Shape) -> int:
        return min(shape.length, self.window or shape.length)

    def problem(self, shape: Shape, mode: str, draw: Draw) -> Problem:
        """Random normal queries, keys and values, in the layout of a projection; decoding asks with one token."""
        kept, asked = (self._kept(shape), 1) if mode == "decode" else (shape.length, shape.length)
        inputs = _qkv(shape, draw, asked, kept)
        seen = torch.ones(shape.batch, 1, kept, dtype=torch.bool, device=draw.device)
        window = self.window

        def call(own: Tensors) -> Tensors:
            q, k, v = own["q"], own["k"], own["v"]
            if mode == "decode":
                return {"o": decode_attention(q[:, :, 0], k, v, seen)[:, :, None]}
            return {"o": attention(q, k, v, causal=True) if window is None else banded_attention(q, k, v, window=window)}

        def definition(own: Tensors) -> Tensors:
            mask = band_mask(asked, kept, window=window, device=draw.device)
            return {"o": attention_reference(own["q"], own["k"], own["v"], mask)}

        return Problem(inputs, call, definition, learned_in(inputs, mode), dict(TOLERANCES[precision_of(draw.dtype)]))


@dataclass(frozen=True)
class ChosenBlocks:
    """Attention to the blocks of keys that each token chose; the heads of q share keys, values and the choice.

    Args:
        block: keys of a block.
        chosen: blocks that a token reads, its own one included.
    """

    block: int
    chosen: int

    def cost(self, shape: Shape, mode: str, item: int) -> Cost:
        """See `bench.throughput.bounds`; the choice is not counted."""
        whole, rest = divmod(shape.length, self.block)
        past = sum(min(n, self.chosen - 1) * (self.block if n < whole else rest) for n in range(whole + 1)) * self.block
        own = whole * bounds.visible_pairs(self.block, None) + bounds.visible_pairs(rest, None)
        return bounds.attention(shape, mode, item=item, pairs=past + own)

    def state_bytes(self, shape: Shape, item: int) -> int:
        """Keys and values of one sequence."""
        return shape.length * shape.groups * (shape.key + shape.value) * item

    def problem(self, shape: Shape, mode: str, draw: Draw) -> Problem:
        """Random queries choose among random keys; "blocks" is the choice as numbers, [B, T, G, chosen], -1 for none."""
        inputs = _qkv(shape, draw, shape.length, shape.length)
        learned = learned_in(inputs, mode)
        padded = F.pad(inputs["k"], (0, 0, 0, -shape.length % self.block))
        token = torch.arange(shape.length, device=draw.device)
        mean = padded.unflatten(2, (-1, self.block)).mean(3)
        chosen = choose_blocks(inputs["q"], mean, token, block=self.block, top_k=self.chosen - 1)
        best = chosen.byte().topk(min(self.chosen, mean.shape[2]), -1)
        numbers = torch.where(best.values > 0, best.indices, -1).transpose(1, 2)
        inputs["blocks"] = F.pad(numbers, (0, self.chosen - numbers.shape[-1]), value=-1)

        def definition(own: Tensors) -> Tensors:
            visible = chosen.repeat_interleave(self.block, -1)[..., : shape.length] & (token <= token[:, None])
            k, v = (share_heads(own[name], shape.heads) for name in ("k", "v"))
            return {"o": attention_reference(own["q"], k, v, visible.repeat_interleave(shape.heads // shape.groups, 1))}

        return Problem(
            inputs,
            lambda own: {"o": block_attention(own["q"], own["k"], own["v"], chosen, block=self.block, most=self.chosen)},
            definition,
            learned,
            dict(TOLERANCES[precision_of(draw.dtype)]),
        )


def _qkv(shape: Shape, draw: Draw, asked: int, kept: int) -> Tensors:
    """Queries, keys and values [B, heads, T, width] as a projection leaves them: time before heads in memory."""
    sizes = {"q": (asked, shape.heads, shape.key), "k": (kept, shape.groups, shape.key), "v": (kept, shape.groups, shape.value)}
    return {name: draw.normal(shape.batch, *size).transpose(1, 2) for name, size in sizes.items()}
