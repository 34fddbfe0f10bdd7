"""What a conversion is: recipes, layer plans, stages and data sources as frozen data.

A recipe is a layer plan (which layers become what) and a list of stages (what is matched, what is trained, on how many
tokens). Published recipes differ in the values of these fields only; see the files in
`bench/convert/recipes/`.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from bench.spec import Frozen

Group = Literal["mixer", "qkv", "o", "mlp", "norms", "embeddings", "all"]
"""Groups of parameters: `mixer` is everything that the teacher does not have, `qkv` and `o` are attention's projections."""


SELECTION = re.compile(r"all|none|every:\d+|kl:\d+|\d+(-\d+)?( *, *\d+(-\d+)?)*")
"""What selects layers, whose number only the teacher tells (`bench.convert.plans`)."""


class LayerPlan(Frozen):
    """Which layers are converted, and what stands in the place of their softmax attention."""

    layers: str = "all"
    """all; every:k, which keeps every k-th softmax layer; a list such as 0,1,5-9 to convert; or kl:n, which keeps the n
    softmax layers that restore most of the teacher's distribution."""
    mixer: str | None = "linear_attention"
    """A mixer of the zoo, or None for the window alone."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the mixer; heads and widths follow the teacher unless given."""
    rope: Literal["keep", "drop", "after_map"] = "keep"
    """Whether the mixer's queries and keys are rotated as the teacher's, not at all, or as features, after the mixer's map."""
    groups: Literal["repeat", "share"] = "repeat"
    """Grouped-query attention: repeat keys, so that every query head has a state of its own, or share one state among the
    query heads of a group, which are then read from it one by one."""
    projections: Literal["share", "copy"] = "share"
    """share the teacher's projections to queries, keys and values with the window, or copy them, so that the mixer's train
    apart from the window's."""
    window: int = Field(default=64, ge=0)
    """Keys that softmax still sees, the own one included; 0 for no window."""
    sinks: int = Field(default=0, ge=0)
    """First tokens that softmax sees at any distance."""
    far_heads: str = ""
    """Key heads whose window holds `far_window` keys: a list such as 8.0,18.2 (layer and head, counted from 0; 18 for the
    whole layer), or auto:n, the n that recall is measured to need most."""
    far_window: int = Field(default=0, ge=0)
    """Keys that far heads see."""
    far_keys: Literal["newest", "best"] = "newest"
    """Which keys those are: the newest, or the newest `window` and of all others the best by a learned score, which a stage
    that captures far_attention trains."""
    sink_logits: int = Field(default=0, ge=0)
    """Learned scores that every query of the window sees and that have no value, so they only weaken it (Lizard)."""
    window_rope: Literal["keep", "drop"] = "keep"
    """Whether the window's queries and keys are rotated as the teacher's."""
    combine: Literal["shared_denominator", "sum", "gate"] = "shared_denominator"
    """How window and mixer join: one normaliser over both (LoLCATs), a fixed weighted sum (Liger), or a learned convex
    sum with a gate per head and token."""
    window_weight: float = 1.0
    """Weight of the window in `sum`."""
    mixer_weight: float = 1.0
    """Weight of the mixer in `sum`."""

    @field_validator("mixer", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("layers")
    @classmethod
    def _selection(cls, text: str) -> str:
        if SELECTION.fullmatch(text.strip()) is None:
            raise ValueError(f"{text!r} selects no layers; write all, none, every:4 (keep every 4th softmax), 0,2,5-9 or kl:2")
        return text

    @model_validator(mode="after")
    def _something(self) -> LayerPlan:
        if self.mixer is None and self.window == 0:
            raise ValueError("a converted layer needs a mixer, a window, or both")
        if self.sinks and not self.window:
            raise ValueError("sinks belong to a window; set window too")
        if bool(self.far_heads) != bool(self.far_window):
            raise ValueError("far_heads names heads and far_window their window; set both")
        joint = self.mixer is not None and self.combine == "shared_denominator"
        if self.far_heads and (joint or self.sink_logits or not 0 < self.window <= self.far_window):
            raise ValueError("far heads need a window of at most far_window keys, joined by sum or gate and without sink_logits")
        if self.sink_logits and (not self.window or (self.mixer and self.combine == "shared_denominator")):
            raise ValueError("sink_logits belong to a window that is joined by sum or gate")
        return self


class Lora(Frozen):
    """Low-rank adapters (Hu et al. 2021), merged into the weights when the stage ends."""

    rank: int = Field(default=8, gt=0)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class Stage(Frozen):
    """One stage of training: what is matched, what trains, how, and on how many tokens.

    All captures but `logits` see the teacher's own hidden states, layer by layer, so layers train at once and
    independently; `logits` runs the student from end to end.
    """

    capture: Literal["attn_weights", "attn_out", "mixer_out", "block_out", "far_attention", "logits"]
    """What is compared: attention matrices, heads before the output projection, the attention block, the whole layer, the
    score of far heads' keys with the attention that they draw from beyond the window, or the distribution over the next token."""
    loss: Literal["mse", "l2", "frobenius", "cross_entropy", "kl_ce"] = "mse"
    """mse per element, l2 norm per token, Frobenius norm or cross-entropy of attention rows; `kl_ce` for logits."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the loss of a captured layer."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of KL(teacher || student), per token."""
    ce: float = Field(default=0.0, ge=0)
    """Weight of next-token cross-entropy on the data."""
    z: float = Field(default=0.0, ge=0)
    """Weight of z-loss, the square of the logarithm of softmax's normaliser, per token."""
    temperature: float = Field(default=1.0, gt=0)
    """Of both distributions in the KL."""
    train: tuple[Group, ...] = ("mixer",)
    """Groups of parameters that train, besides adapters."""
    lora: Lora | None = None
    """Adapters to train, or None."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    mixer_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the group `mixer`, if it differs."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled."""
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    schedule: Literal["constant", "cosine", "wsd", "plateau"] = "cosine"
    """Learning rate over the stage: constant; cosine; warm-up, stable, linear decay over the last fifth; or a tenth each
    time the mean loss of 100 steps has not improved for ten such means."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the stage with a linear warm-up."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Smallest learning rate as a share of the peak."""
    seq_len: int = Field(default=1024, gt=1)
    """Tokens of a packed training sequence."""
    batch_tokens: int = Field(default=8192, gt=1)
    """Tokens per optimiser step."""
    micro_tokens: int | None = Field(default=None, gt=1)
    """Tokens per forward pass, if a whole batch does not fit in memory."""
    tokens: int = Field(default=20_000_000, gt=0)
    """Length of the stage."""
    replace: tuple[float, ...] = ()
    """Shares of the converted layers that speak in equal parts of the stage, the teacher's attention standing in for the others;
    empty for all from the start."""

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        allowed = {
            "attn_weights": ("frobenius", "cross_entropy"),
            "attn_out": ("mse", "l2"),
            "mixer_out": ("mse", "l2"),
            "block_out": ("mse", "l2"),
            "far_attention": ("mse",),
            "logits": ("kl_ce",),
        }[self.capture]
        if self.loss not in allowed:
            raise ValueError(f"capture {self.capture} is compared by {' or '.join(allowed)}, not by {self.loss}")
        if self.replace and (self.capture != "logits" or not all(0 < share <= 1 for share in self.replace)):
            raise ValueError("replace belongs to a stage that captures logits, and holds shares above 0 and up to 1")
        if self.capture == "logits" and self.kl == self.ce == 0:
            raise ValueError("capture logits needs kl or ce above 0")
        if not self.train and self.lora is None:
            raise ValueError("nothing would train: name a group in train, or set lora")
        return self


class Source(Frozen):
    """Where training text comes from."""

    kind: Literal["text", "dataset", "packages", "corpus", "recall"]
    """Local text files, a Hugging Face data set, text of installed packages, a corpus of `bench sample`, or rendered
    recall tasks."""
    where: str = ""
    """Path or name; empty for `packages`; for `recall` one of its kinds, or empty for all in equal shares."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the training tokens, before normalisation."""

    def label(self) -> str:
        """The source as it is written on the command line."""
        name = f"{self.kind}:{self.where}" if self.where else self.kind
        return name if self.weight == 1 else f"{name}={self.weight:g}"


class Recipe(Frozen):
    """A whole conversion, apart from the model it is applied to."""

    name: str
    summary: str
    """Where it is published, and what we changed."""
    plan: LayerPlan
    stages: tuple[Stage, ...] = ()
    data: tuple[Source, ...] = (Source(kind="packages"),)
    seed: int = Field(default=0, ge=0)

    def tokens(self) -> int:
        """Training tokens of all stages."""
        return sum(stage.tokens for stage in self.stages)
