"""DeltaNet (Schlag et al. 2021; Yang et al. 2024): each write first erases what its key reads.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t,    |k_t| = 1

Shape legend: B batch, T time, D width, H heads, K key width of a head, V value width of a head, P conv taps - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.layer_step import Packed, layer_step
from kernels.recurrence import linear_recurrence
from kernels.rows import pick_rows
from kernels.step_form import StepForm
from mixers._base import Mixer, State, heads, mixer
from mixers._fused import conv_of, is_fused, next_state
from mixers._layers import RMSNorm, ShortConv, l2_normalize, refuse_context, widen


@mixer("delta_net")
class DeltaNet(Mixer):
    """DeltaNet as Yang et al. 2024, section 3.3, with the two heads of Zoology's figures and no output gate.

    Args:
        n_heads: number of heads.
        expand_k: key width over all heads as a multiple of D.
        expand_v: value width over all heads as a multiple of D.
        conv: taps of the short convolutions on q, k and v, which SiLU follows; 0 for none.
        silu: apply that SiLU, without a convolution too; a pretrained attention's values have no such kink.
        negative_eigenvalues: beta in (0, 2) instead of (0, 1), so that a write can flip a direction (Grazzi et al. 2025).
    """

    variants = ({}, {"conv": 0, "n_heads": 1}, {"negative_eigenvalues": True, "expand_k": 0.5, "expand_v": 2.0})
    input_maps = ("beta_proj",)

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        n_heads: int = 2,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int = 4,
        silu: bool = True,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        d_key, d_value = int(expand_k * d_model), int(expand_v * d_model)
        self.n_heads, self.max_beta = n_heads, 2.0 if negative_eigenvalues else 1.0
        self.k_dim = heads(d_key, n_heads, what="expand_k * d_model")
        self.v_dim = heads(d_value, n_heads, what="expand_v * d_model")
        self.qkv_proj = nn.Linear(d_model, 2 * d_key + d_value, bias=False)
        self.conv = ShortConv(2 * d_key + d_value, conv, silu=silu)
        self.beta_proj = nn.Linear(d_model, n_heads, bias=False)
        self.norm = RMSNorm(self.v_dim)
        self.o_proj = nn.Linear(d_value, d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        refuse_context(self, context_BSD)
        o_BTE, state = self.mix(self.qkv_proj(x_BTD), x_BTD, state)
        return self.o_proj(o_BTE), state

    def mix(self, qkv_BTE: Tensor, x_BTD: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """See `Mixer.mix`."""
        if is_fused(self, x_BTD, state, taps=self.conv.taps):
            o_BE, state = self._fused(qkv_BTE[:, 0], x_BTD[:, 0], state)
            return o_BE[:, None], state
        o_BTHV, s_BHKV, tail_BPD = self._recur(qkv_BTE, x_BTD, state)
        return self._output(o_BTHV, x_BTD), None if state is None else {"s": s_BHKV, "conv": tail_BPD}

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """See `Mixer.at_rows`: what follows the recurrence is left out elsewhere."""
        o_BTHV, _, _ = self._recur(self.qkv_proj(x_BTD), x_BTD, None)
        o_BMHV = pick_rows(o_BTHV.flatten(-2), rows_BM).unflatten(-1, (self.n_heads, self.v_dim))
        return self.o_proj(self._output(o_BMHV, x_BMD))

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        if is_fused(self, x_BD, state, taps=self.conv.taps):
            o_BE, state = self._fused(self.qkv_proj(x_BD), x_BD, state)
            return self.o_proj(o_BE), state
        qkv, tail_BPD = self.conv.step(self.qkv_proj(x_BD), state["conv"])
        q_BHK, k_BHK, v_BHV = self._split(qkv)
        old_BHV = (k_BHK[..., None] * state["s"]).sum(-2)
        write_BHV = self._beta(x_BD)[..., None] * (v_BHV - old_BHV)
        s_BHKV = state["s"] + k_BHK[..., None] * write_BHV[..., None, :]
        o_BHV = (q_BHK[..., None] * s_BHKV).sum(-2)
        return self.o_proj(self._output(o_BHV, x_BD)), {"s": s_BHKV.to(state["s"].dtype), "conv": tail_BPD}

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`."""
        return {
            "s": torch.zeros(batch, self.n_heads, self.k_dim, self.v_dim, device=device, dtype=dtype),
            "conv": self.conv.init_tail(batch, device=device, dtype=dtype),
        }

    def published_elements(self, seq_len: int) -> int:
        """See `Mixer.published_elements`: Zoology's plots count the matrix state, without convolution tails."""
        return self.n_heads * self.k_dim * self.v_dim

    def _fused(self, qkv_BE: Tensor, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token in one launch, without the projections: the heads' outputs and the state."""
        d_key = self.n_heads * self.k_dim
        done = layer_step(
            Packed(qkv_BE, (0, d_key, 2 * d_key)),
            state["s"],
            StepForm(
                silu=self.conv.silu,
                unit=True,
                scale=self.k_dim**-0.5,
                open_beta=True,
                max_beta=self.max_beta,
                norm="rms",
                eps=self.norm.eps,
            ),
            conv=conv_of(self.conv, state),
            beta_BH=self.beta_proj(x_BD),
            norm_weight=self.norm.weight,
        )
        return done.y_BE.to(x_BD.dtype), next_state(state, done.state_BHKV, done.tail_BPC)

    def _recur(self, qkv_BTE: Tensor, x_BTD: Tensor, state: State | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The recurrence's outputs [B, T, H, V], its state, and the convolution's tail."""
        qkv, tail_BPD = self.conv(qkv_BTE, None if state is None else state["conv"])
        q_BTHK, k_BTHK, v_BTHV = self._split(qkv)
        o_BTHV, s_BHKV = linear_recurrence(
            q_BTHK, k_BTHK, v_BTHV, beta_BTH=self._beta(x_BTD), state_BHKV=None if state is None else state["s"]
        )
        return o_BTHV, s_BHKV, tail_BPD

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each head, [..., H, K or V]; queries and keys have unit length."""
        d_key, d_value = self.n_heads * self.k_dim, self.n_heads * self.v_dim
        q, k, v = (x.unflatten(-1, (self.n_heads, -1)) for x in qkv.split((d_key, d_key, d_value), dim=-1))
        return l2_normalize(q) * self.k_dim**-0.5, l2_normalize(k), v

    def _beta(self, x: Tensor) -> Tensor:
        """Write strength, [..., H]."""
        return self.max_beta * torch.sigmoid(widen(self.beta_proj(x)))

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o).flatten(-2).to(x.dtype)
