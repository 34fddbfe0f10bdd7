"""Fitting a mixer of the zoo to a pretrained attention layer: what the layer is, which options follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench import catalog
from bench.convert.spec import LayerPlan
from bench.errors import UserError
from mixers import Mixer
from mixers._base import AttentionWeights

MEMORY = 100.0
"""Initial memory of decaying mixers as a multiple of their own default, which is made for training from scratch: half of
it lies within a usual window, whereas a teacher's attention forgets nothing."""
LONG = 1 << 17
"""A length beyond every window: a state that still grows there is not constant."""


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of a grouped-query attention layer.

    Args:
        d_model: width D of the residual stream.
        n_heads: query heads H.
        n_kv_heads: key and value heads.
        head_dim: K.
        scale: factor on q . k.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float

    @property
    def width(self) -> int:
        """H K, the width of all heads."""
        return self.n_heads * self.head_dim

    def grouped(self) -> AttentionShape:
        """The same layer as a mixer sees it that has one head for every key head."""
        return replace(self, n_heads=self.n_kv_heads)


def attention_shape(attention: nn.Module, where: str) -> AttentionShape:
    """Sizes of a teacher's attention module, or why it cannot be converted.

    Args:
        attention: the module.
        where: how an error names it, e.g. "layer 3 (LlamaAttention)".

    Raises:
        UserError: not softmax attention with separate q, k, v and o projections of plain shape.
    """
    missing = [
        name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if not isinstance(getattr(attention, name, None), nn.Linear)
    ]
    if missing:
        raise UserError(
            f"{where} cannot be converted: it has no separate {', '.join(missing)}; supported are attention layers with q_proj, "
            "k_proj, v_proj and o_proj (Llama, SmolLM2, Qwen2, Qwen3, Mistral, Gemma)."
        )
    q_proj, k_proj = cast(nn.Linear, attention.q_proj), cast(nn.Linear, attention.k_proj)
    head_dim = int(getattr(attention, "head_dim", 0))
    for name in ("sinks", "attn_logit_softcapping"):
        if getattr(attention, name, None) is not None:
            raise UserError(f"{where} cannot be converted: its softmax has {name}, which no mixer here takes over.")
    norm = getattr(getattr(attention, "q_norm", None), "weight", None)
    if norm is not None and norm.numel() != head_dim:
        raise UserError(f"{where} cannot be converted: it norms queries over {norm.numel()} channels, not per head.")
    n_heads = cast(nn.Linear, attention.o_proj).in_features // max(head_dim, 1)
    if not head_dim or q_proj.out_features != n_heads * head_dim:
        raise UserError(f"{where} cannot be converted: its queries are {q_proj.out_features} wide, not heads x head_dim.")
    scale = float(getattr(attention, "scaling", head_dim**-0.5))
    return AttentionShape(q_proj.in_features, n_heads, k_proj.out_features // head_dim, head_dim, scale)


def build_mixer(plan: LayerPlan, shape: AttentionShape, layer: int) -> Mixer:
    """The mixer of a layer plan with the teacher's sizes.

    Raises:
        UserError: the mixer does not exist, does not fit the teacher's sizes, or its state grows with the sequence.
    """
    assert plan.mixer is not None
    cls = catalog.load("mixer", plan.mixer)
    if not (isinstance(cls, type) and issubclass(cls, Mixer)):
        raise UserError(f"{plan.mixer} is a pattern of several layers; a converted layer holds one mixer.")
    seen = shape.grouped() if plan.groups == "share" else shape
    # Without an option of its own, the width of the heads is the model's.
    offered = set(catalog.options_of(cls))
    free = "head_dim" in offered or {"expand_k", "expand_v"} <= offered
    width = seen.width if reads_heads(cls) and not free else shape.d_model
    options = default_options(cls, seen, width) | catalog.check_options("mixer", plan.mixer, cls, plan.options)
    build = cast(Any, cls)
    try:
        mixer = build(width, layer=layer, **options)
        with torch.device("meta"):
            grows = build(width, layer=layer, **options).state_elements(2 * LONG) > mixer.state_elements(LONG)
    except ValueError as error:
        raise UserError(f"{plan.mixer} does not fit this model: {error}.") from None
    if not cls.caps.recurrent:
        raise UserError(
            f"{plan.mixer} recomputes each token from the stored history, so it linearises nothing; choose another mixer."
        )
    if grows:
        raise UserError(f"{plan.mixer} keeps a state that grows with the sequence, so it linearises nothing; choose another mixer.")
    if width != shape.d_model:
        _try_heads(mixer, plan, seen)
    return mixer


@torch.no_grad()
def _try_heads(mixer: Mixer, plan: LayerPlan, shape: AttentionShape) -> None:
    """Two tokens through the mixer: some take gates from an input that must be as wide as the heads.

    Raises:
        UserError: they do not go through.
    """
    if any(parameter.is_meta for parameter in mixer.parameters()):
        return  # transformers loads a model that went through before
    try:
        mixer.mix(torch.zeros(1, 2, 3 * shape.width), torch.zeros(1, 2, shape.d_model))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{plan.mixer} does not fit this model: its input must be as wide as its heads, which are {shape.width} wide here in a "
            f"model {shape.d_model} wide; gated_delta_net, gla and normalized_gla have no such limit."
        ) from error


def reads_heads(mixer: Mixer | type[Mixer]) -> bool:
    """Whether the mixer takes q, k and v from the teacher's projections (`Mixer.mix`)."""
    return (mixer if isinstance(mixer, type) else type(mixer)).mix is not Mixer.mix


def loads_attention(mixer: Mixer | type[Mixer]) -> bool:
    """Whether the mixer can take over the teacher's projections into its own (`Mixer.load_attention`)."""
    return (mixer if isinstance(mixer, type) else type(mixer)).load_attention is not Mixer.load_attention


def default_options(cls: type[Mixer], shape: AttentionShape, d_model: int) -> dict[str, Any]:
    """The options that follow from the teacher, for those that the mixer has.

    A mixer that reads the teacher's heads gets as many heads of the same width, no short convolution and no SiLU, which
    would take the sign from the copied values.
    """
    ratio = (shape.width + 0.5) / d_model  # mixers round down, and so must not meet 2.999
    wanted: dict[str, Any] = {}
    if reads_heads(cls):
        wanted = {
            "n_heads": shape.n_heads,
            "head_dim": shape.head_dim,
            "expand_k": ratio,
            "expand_v": ratio,
            "conv": 0,
            "silu": False,
            "memory": MEMORY,
        }
    elif loads_attention(cls):
        wanted = {
            "head_dim": shape.head_dim,
            "d_state": shape.head_dim,
            "n_groups": shape.n_heads,
            "expand": max(1, round(ratio)),
        }
    return {name: value for name, value in wanted.items() if name in catalog.options_of(cls)}


def attention_weights(attention: nn.Module, shape: AttentionShape) -> AttentionWeights:
    """The projections of a teacher's layer with grouped keys and values repeated to all heads."""

    def repeated(name: str) -> Tensor:
        weight = getattr(attention, name).weight.detach().unflatten(0, (shape.n_kv_heads, shape.head_dim))
        return weight.repeat_interleave(shape.n_heads // shape.n_kv_heads, dim=0).flatten(0, 1)

    q, o = (getattr(attention, name).weight.detach() for name in ("q_proj", "o_proj"))
    return AttentionWeights(q=q, k=repeated("k_proj"), v=repeated("v_proj"), o=o, head_dim=shape.head_dim)
