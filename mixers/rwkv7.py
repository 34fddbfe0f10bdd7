"""RWKV-7 time mixing (Peng et al. 2025): a delta rule with separate removal and replacement keys and vector decays.

    S_t = (Diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T,    |kappa_t| = 1
    p_t = groupnorm(S_t^T r_t) + (sum(r_t * rho * k_t)) v_t,    y_t = (g_t * p_t) W_o

The state here is the transpose of the paper's. r, w, k, v, a and g each read their own mix of x_t and x_{t-1}.

Shape legend: B batch, T time, D width, H heads, K width of a head (of keys and values alike).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels.dplr import dplr_recurrence
from kernels.rows import pick_rows
from mixers._base import AttentionWeights, Mixer, State, mixer
from mixers._layers import HeadNorm, LowRank, head_count, l2_normalize, refuse_context, widen

LOG_DECAY_SCALE = -math.exp(-0.5)
"""The strongest log decay per token: w = exp(-exp(-1/2) sigmoid(.)), at least 0.545 (section 4.1)."""


@mixer("rwkv7")
class RWKV7(Mixer):
    """RWKV-7's time mixing as one layer on its own: the value residual, which needs the first layer's v, is left out.

    Args:
        head_dim: K, cut down to D where that is smaller.
        decay_rank: bottleneck of w; the ranks are those of Zoology's figures.
        rate_rank: bottleneck of a, the in-context learning rate.
        gate_rank: bottleneck of g.
    """

    variants = ({}, {"head_dim": 8, "decay_rank": 4, "rate_rank": 3, "gate_rank": 5})

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        head_dim: int = 64,
        decay_rank: int = 16,
        rate_rank: int = 16,
        gate_rank: int = 64,
    ) -> None:
        super().__init__(d_model, pattern=pattern)
        self.n_heads = head_count(d_model, head_dim, what="d_model")
        self.head_dim = d_model // self.n_heads
        self.shift = nn.Parameter(torch.rand(6, d_model))
        self.r_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.decay = LowRank(d_model, decay_rank, d_model, activation="tanh")
        self.rate = LowRank(d_model, rate_rank, d_model)
        self.gate = LowRank(d_model, gate_rank, d_model, bias=False, activation="sigmoid")
        self.removal_scale = nn.Parameter(torch.full((self.n_heads, self.head_dim), 0.85))
        self.replacement_mix = nn.Parameter(torch.ones(self.n_heads, self.head_dim))
        self.bonus = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        self.norm = HeadNorm(self.n_heads, self.head_dim, eps=1e-5 * self.head_dim)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        refuse_context(self, context_BSD)
        before_BTD = self._before(x_BTD, state)
        read, s_BHKK = self._recur(x_BTD, before_BTD, None if state is None else state["s"])
        y_BTD = self._output(*read, self._gate(x_BTD, before_BTD))
        return y_BTD, None if state is None else {"s": s_BHKK, "x": x_BTD[:, -1].to(state["x"].dtype)}

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """See `Mixer.at_rows`: what follows the recurrence is left out elsewhere."""
        before_BTD = self._before(x_BTD, None)
        read, _ = self._recur(x_BTD, before_BTD, None)
        picked = (self._heads(pick_rows(part.flatten(-2), rows_BM)) for part in read)
        return self._output(*picked, self._gate(x_BMD, pick_rows(before_BTD, rows_BM)))

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        before_BD = state["x"].to(x_BD.dtype)
        r, log_w, k, v, a, kappa = self._project(x_BD, before_BD)
        removed_BHK = (kappa[..., None] * state["s"]).sum(-2)
        s_BHKK = (
            log_w.exp()[..., None] * state["s"]
            - (a * kappa)[..., None] * removed_BHK[..., None, :]
            + k[..., None] * v[..., None, :]
        )
        o_BHK = (r[..., None] * s_BHKK).sum(-2)
        new = {"s": s_BHKK.to(state["s"].dtype), "x": x_BD.to(state["x"].dtype)}
        return self._output(o_BHK, r, k, v, self._gate(x_BD, before_BD)), new

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`: the matrix state, and the token before for the token shift."""
        return {
            "s": torch.zeros(batch, self.n_heads, self.head_dim, self.head_dim, device=device, dtype=dtype),
            "x": torch.zeros(batch, self.d_model, device=device, dtype=dtype),
        }

    def load_attention(self, weights: AttentionWeights) -> None:
        """See `Mixer.load_attention`: r from q, and no token shift to begin with (Goldstein et al. 2025, RADLADS)."""
        if (len(weights.q), weights.head_dim) != (self.d_model, self.head_dim):
            raise ValueError(
                f"{self.n_heads} heads of {self.head_dim} do not fit queries {len(weights.q)} wide in heads of {weights.head_dim}"
            )
        with torch.no_grad():
            self.shift.zero_()
            self.r_proj.weight.copy_(weights.q * weights.head_dim**-0.5)
            self.k_proj.weight.copy_(weights.k)
            self.v_proj.weight.copy_(weights.v)
            self.o_proj.weight.copy_(weights.o)

    def published_elements(self, seq_len: int) -> int:
        """See `Mixer.published_elements`: Zoology's plots count the matrix state, without the token shift."""
        return self.d_model * self.head_dim

    def _before(self, x_BTD: Tensor, state: State | None) -> Tensor:
        """The token before each one."""
        first_B1D = torch.zeros_like(x_BTD[:, :1]) if state is None else state["x"].to(x_BTD.dtype)[:, None]
        return torch.cat((first_B1D, x_BTD[:, :-1]), dim=1)

    def _recur(self, x_BTD: Tensor, before_BTD: Tensor, s_BHKK: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The recurrence's output and what `_output` reads beside it, [B, T, H, K] each; and the state."""
        r, log_w, k, v, a, kappa = self._project(x_BTD, before_BTD)
        o, s_BHKK = dplr_recurrence(r, k, v, -a * kappa, kappa, log_decay_BTHK=log_w, state_BHKV=s_BHKK)
        return (o, r, k, v), s_BHKK

    def _gate(self, x: Tensor, before: Tensor) -> Tensor:
        """g, [..., D]."""
        return self.gate(torch.addcmul(x, before - x, self.shift[5].to(x.dtype)))

    def _project(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """Receptance r, log decay, replacement key, value, learning rate a, removal key: [..., H, K]."""
        difference = before - x
        x_r, x_w, x_k, x_v, x_a = (torch.addcmul(x, difference, mix.to(x.dtype)) for mix in self.shift[:5].unbind(0))
        r, k, v = self._heads(self.r_proj(x_r)), self._heads(self.k_proj(x_k)), self._heads(self.v_proj(x_v))
        log_w = LOG_DECAY_SCALE * torch.sigmoid(widen(self._heads(self.decay(x_w))))
        a = torch.sigmoid(widen(self._heads(self.rate(x_a))))
        kappa = l2_normalize(widen(k) * self.removal_scale)
        k = widen(k) * (1 + (a - 1) * self.replacement_mix)
        return r, log_w, k, v, a, kappa

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, self.head_dim))

    def _output(self, o: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        p = self.norm(o) + (r * k * self.bonus).sum(-1, keepdim=True) * v
        return self.o_proj(g * p.flatten(-2).to(g.dtype))
