"""What layers do around their recurrence in one token, as a few switches that one kernel serves."""

from __future__ import annotations

from typing import NamedTuple

MAX_TAPS = 4


class StepForm(NamedTuple):
    """The switches and numbers of `kernels.layer_step.layer_step`; the default is the bare recurrence.

    Args:
        silu: SiLU on q, k and v, after their short convolution if there is one.
        unit: q and k are then scaled to unit length, eps 1e-6 under the root.
        scale: factor of q after that.
        key_scale: factor of k.
        decay: what is given: `log`, the log decay itself; `rate`, x of -exp(log_rate) softplus(x + decay_bias); or `sigmoid`,
            x of logsigmoid(x) / temperature.
        temperature: see `decay`.
        stepped: v is multiplied by the softplus of `rate`, as a discretised state space model does.
        open_beta: the write strength is max_beta sigmoid(beta) instead of beta.
        max_beta: see `open_beta`.
        norm: `rms` or `layer` over each head; `row`, RMS over all heads of what is gated already; `sums`, division by the
            decayed sum of keys times q; or `none`.
        eps: of the norm.
        gate: `silu` or `sigmoid` of the output gate, or `none`.
    """

    silu: bool = False
    unit: bool = False
    scale: float = 1.0
    key_scale: float = 1.0
    decay: str = "log"
    temperature: float = 1.0
    stepped: bool = False
    open_beta: bool = False
    max_beta: float = 1.0
    norm: str = "none"
    eps: float = 1e-5
    gate: str = "none"
