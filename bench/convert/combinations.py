"""Which combinations of mixer and layer plan can be had, and why not: shared states, copied projections, rotations, normalisers."""

from __future__ import annotations

import copy
import inspect
from typing import cast

from torch import nn

from bench.convert.fit import AttentionShape, reads_heads
from bench.convert.spec import LayerPlan
from bench.errors import UserError
from mixers import Mixer
from mixers._feature_maps import Taylor2
from mixers.linear_attention import LinearAttention

READ = ("q_proj", "k_proj", "v_proj")
"""The projections that a mixer reads."""


def readers_of(plan: LayerPlan, shape: AttentionShape, mixer: nn.Module | None) -> int:
    """Query heads that share a state.

    Raises:
        UserError: they cannot, or need not.
    """
    if plan.groups == "repeat" or mixer is None:
        return 1
    if (
        not reads_heads(cast(Mixer, mixer))
        or plan.combine == "shared_denominator"
        or getattr(getattr(mixer, "conv", None), "taps", 0)
    ):
        raise UserError(
            f"groups=share cannot be had with {plan.mixer} under combine={plan.combine}: it needs a mixer that reads the teacher's "
            "heads without a convolution, such as gated_delta_net or gla, joined by sum or gate."
        )
    return shape.n_heads // shape.n_kv_heads


def copied_projections(attention: nn.Module, plan: LayerPlan, mixer: Mixer | None) -> nn.ModuleDict:
    """Projections like the teacher's that only the mixer reads; `take_over` gives them their values.

    Raises:
        UserError: the mixer reads no heads of its own.
    """
    if mixer is None or not reads_heads(mixer) or (plan.window and plan.combine == "shared_denominator"):
        raise UserError(
            f"projections=copy cannot be had with {plan.mixer} under combine={plan.combine}: it needs a mixer that reads the "
            "teacher's heads, such as gated_delta_net or gla, joined by sum or gate."
        )
    return nn.ModuleDict({name[0]: copy.deepcopy(getattr(attention, name)) for name in READ})


def check_rotation(plan: LayerPlan, mixer: Mixer | None) -> None:
    """Refuses rotation after a map that the mixer does not offer to rotate.

    Raises:
        UserError: it does not.
    """
    if plan.rope == "after_map" and (mixer is None or "rotate" not in inspect.signature(mixer.mix).parameters):
        raise UserError(f"rope=after_map cannot be had with {plan.mixer}: only supra rotates its features; use keep or drop.")


def positive(mixer: nn.Module, plan: LayerPlan) -> LinearAttention:
    """The mixer, whose sums of positive features may share softmax's denominator.

    Raises:
        UserError: it has none.
    """
    if not isinstance(mixer, LinearAttention) or not mixer.normalize or isinstance(mixer.phi_k, Taylor2):
        raise UserError(
            f"combine=shared_denominator needs linear_attention with normalize=true and a map such as hedgehog, because it adds "
            f"the mixer's own normaliser to softmax's; {plan.mixer} has none: use --set plan.combine=gate or sum."
        )
    return mixer
