"""Mamba-2 (Dao & Gu 2024): a state space model whose decay is one scalar per token and head; see `mixers._ssd`.

Shape legend: B batch, T time, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixers._base import State, mixer
from mixers._fused import is_fused
from mixers._layers import refuse_context
from mixers._ssd import SSDBlock


@mixer("mamba2")
class Mamba2(SSDBlock):
    """The Mamba-2 block of the paper's section 7 (SSD with a short convolution and a gated norm).

    Args:
        d_state: N. The paper uses 64 to 256, Zoology's figures 8, 16 and 24.
        head_dim: P, cut down to the inner width where that is smaller.
        n_groups: G, the number of heads' groups with B and C of their own.
        expand: inner width as a multiple of D.
        conv: taps of the short convolution on x, B and C; 0 for none.
    """

    variants = ({}, {"d_state": 8, "head_dim": 8, "n_groups": 2}, {"conv": 0, "expand": 1, "head_dim": 4})

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        d_state: int = 16,
        head_dim: int = 64,
        n_groups: int = 1,
        expand: int = 2,
        conv: int = 4,
    ) -> None:
        super().__init__(d_model, pattern=pattern, d_state=d_state, head_dim=head_dim, n_groups=n_groups, expand=expand, conv=conv)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        refuse_context(self, context_BSD)
        if is_fused(self, x_BTD, state, taps=self.conv.taps):
            y_BD, state = self.fused_step(x_BTD[:, 0], state)
            return y_BD[:, None], state
        y, _, z, state = self.scan(x_BTD, state)
        return self.project_out(y, z), state

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """See `Mixer.at_rows`: the gate, the norm and the output projection are left out elsewhere."""
        return self.project_out(*self.scan_rows(x_BTD, rows_BM, x_BMD))

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        if is_fused(self, x_BD, state, taps=self.conv.taps):
            return self.fused_step(x_BD, state)
        y, _, z, state = self.scan_step(x_BD, state)
        return self.project_out(y, z), state

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`."""
        return self.scan_state(batch, device=device, dtype=dtype)

    def published_elements(self, seq_len: int) -> int:
        """See `Mixer.published_elements`: Zoology's plots count the SSM state, without the convolution tail."""
        return self.d_inner * self.d_state
