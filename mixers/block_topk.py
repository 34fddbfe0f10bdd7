"""Block-sparse attention whose blocks each query chooses by content (Lu et al. 2025, MoBA; selection branch of NSA).

The past is cut into blocks; a query scores a block by its dot product with the block's mean key, and attends to the
`top_k` best complete blocks and, causally, to its own. The choice carries no gradient; the attention does.

Shape legend: B batch, T time, S stored keys, N blocks, D width, H heads, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.indexed_attention import block_attention, choose_blocks
from mixers._base import Caps, Mixer, State, heads, mixer
from mixers._cache import append_kv, attend_cache, kv_cache, merge_heads, new_positions, split_heads


@mixer("block_topk")
class BlockTopK(Mixer):
    """Causal block top-k attention; it stores every key and value, and reads few of them.

    Args:
        n_heads: number of heads; each chooses its own blocks.
        block: tokens in a block.
        top_k: past blocks chosen, besides the own one (MoBA's k counts the own block too).
        bias: whether the projections have biases.
    """

    caps = Caps(patterns=frozenset({"causal_self"}))
    variants = ({"block": 4, "top_k": 2}, {"block": 8, "top_k": 1, "n_heads": 2, "bias": False})

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        n_heads: int = 1,
        block: int = 16,
        top_k: int = 3,
        bias: bool = True,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        if block < 1 or top_k < 1:
            raise ValueError(f"block={block}, top_k={top_k}: both must be at least 1")
        self.n_heads, self.head_dim = n_heads, heads(d_model, n_heads)
        self.block, self.top_k = block, top_k
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        if context_BSD is not None:
            raise ValueError("block_topk reads its own input only; context_BSD belongs to the cross patterns")
        q, k, v = split_heads(self.qkv_proj(x_BTD), 3, self.n_heads)
        if state is None:
            length = q.shape[2]
            whole = F.pad(k.detach(), (0, 0, 0, -length % self.block))
            mean_BHNK = whole.unflatten(2, (-1, self.block)).mean(3)
            position = torch.arange(length, device=q.device)
            chosen = self._chosen(q, mean_BHNK, position)
            y = block_attention(q, k, v, chosen, block=self.block, most=self.top_k + 1)
        else:
            position = new_positions(state, x_BTD)
            index = (position // self.block)[:, None, :, None].expand_as(k)
            mean_BHNK = state["block_mean"].scatter_add(2, index, (k.detach() / self.block).to(state["block_mean"].dtype))
            state = append_kv(state, k, v, position) | {"block_mean": mean_BHNK}
            chosen = self._chosen(q, mean_BHNK.to(q.dtype), position[:, None])
            key_S = torch.arange(state["k"].shape[2], device=q.device)
            in_chosen = chosen.repeat_interleave(self.block, -1)[..., : len(key_S)]
            y = attend_cache(q, state, in_chosen & (key_S <= position[:, None, :, None]))
        return self.out_proj(merge_heads(y)), state

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`: append the token, choose blocks, attend to them and to the own block."""
        y_B1D, state = self.forward(x_BD[:, None], state)
        return y_B1D[:, 0], state

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`: the key-value cache and the mean key of each block, the last one still growing."""
        shape = (batch, self.n_heads, -(-max_len // self.block), self.head_dim)
        cache = kv_cache(batch, self.n_heads, max_len, self.head_dim, device=device, dtype=dtype)
        return cache | {"block_mean": torch.zeros(shape, device=device, dtype=dtype)}

    def read_elements(self, seq_len: int) -> int:
        """See `Mixer.read_elements`: keys and values of the chosen and the own block, and every block's mean key."""
        n_keys = min(seq_len, (self.top_k + 1) * self.block)
        return self.d_model * (2 * n_keys + -(-seq_len // self.block))

    def _chosen(self, q_BHTK: Tensor, mean_BHNK: Tensor, position: Tensor) -> Tensor:
        return choose_blocks(q_BHTK, mean_BHNK, position, block=self.block, top_k=self.top_k)
