"""What a run is: frozen, hashable specs. A run = task + model + training + seed, and its identity is a hash of that.

Nothing here imports torch, so planning and reporting start fast.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SELECTION_SEED = 1000
"""Seeds from here on serve learning-rate selection only; reported seeds count up from 0."""
MAX_LAYERS = 1024
"""More than any published model has (DeepNet: 1,000); each layer is built before anything is planned, a millisecond or two."""


class Frozen(BaseModel):
    """Base of all specs: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def __hash__(self) -> int:
        """Equal specs hash alike, options (a dictionary) included."""
        return hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))


class LayerSpec(Frozen):
    """One layer: a mixer's name (or `file.py@Class`, or `package/name`) and its own options."""

    mixer: str
    options: dict[str, Any] = Field(default_factory=dict)

    def label(self) -> str:
        """The layer as it is written on the command line, e.g. `gla:n_heads=2`."""
        return ":".join([self.mixer, *(f"{key}={value}" for key, value in sorted(self.options.items()))])


class ModelSpec(Frozen):
    """The one generic language model."""

    layers: tuple[LayerSpec, ...] = Field(min_length=1)
    """Mixers, cycled over the depth: three of gla and one of attention make every fourth layer attention."""
    d_model: int = Field(default=64, gt=0)
    """Width of the residual stream."""
    n_layers: int = Field(default=2, gt=0, le=MAX_LAYERS)
    """Number of mixer layers."""
    frame: Literal["zoology", "prenorm"] = "zoology"
    """Block structure: Zoology's, needed to reproduce its figures, or a standard pre-norm block with an MLP."""
    positions: Literal["none", "learned"] = "none"
    """Position embeddings added to the token embeddings."""
    embed_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout rate on the embeddings."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the pre-norm frame's MLP over `d_model`; the Zoology frame has none."""

    alias: str = ""
    """The layers as they were written on the command line; a name to show, not part of a run's identity."""

    def label(self) -> str:
        """The alias, or the layers spelled out."""
        return self.alias or "+".join(layer.label() for layer in self.layers)

    def mixer(self) -> str:
        """The mixer under test: the named pattern of a simple alias, else the mixer of the last layer."""
        if self.alias and not set("+*") & set(self.alias):
            return self.alias.partition(":")[0]
        return self.layer(self.n_layers - 1).mixer

    def layer(self, index: int) -> LayerSpec:
        """The spec of layer `index`, counted from 0."""
        return self.layers[index % len(self.layers)]


class TaskSpec(Frozen):
    """A synthetic task by name, and its own options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class TrainSpec(Frozen):
    """Optimisation: AdamW with decoupled weight decay on every parameter, as in Zoology's experiments."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay."""
    batch_size: int = Field(default=256, gt=0)
    """Examples per step; a batch never mixes cells of different length."""
    epochs: int = Field(default=32, gt=0)
    """Passes over the training split."""
    schedule: Literal["cosine_epoch", "cosine", "constant"] = "cosine_epoch"
    """Learning rate over time: cosine to zero stepped once an epoch (Zoology), every step, or constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    shuffle: Literal["none", "batches", "examples"] = "none"
    """Order of training: cell by cell in a fixed order (Zoology), whole batches permuted, or examples too."""
    stop_at: float | None = Field(default=0.99, gt=0, le=1)
    """Stop once the mean validation accuracy exceeds this; None trains to the end."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision: auto is bf16 autocast on a GPU and fp32 elsewhere."""


class RunSpec(Frozen):
    """One training run, complete."""

    task: TaskSpec
    model: ModelSpec
    train: TrainSpec
    seed: int = Field(default=0, ge=0)

    @property
    def role(self) -> Literal["select", "report"]:
        """Whether the run serves learning-rate selection or is reported."""
        return "select" if self.seed >= SELECTION_SEED else "report"

    def name(self) -> str:
        """The run in a line for people; its task is left out."""
        purpose = "choosing lr" if self.role == "select" else f"seed {self.seed}"
        return f"{self.model.label()} d={self.model.d_model} lr={self.train.lr:g} {purpose}"

    def identity(self) -> dict[str, Any]:
        """Everything that decides what the run computes, as JSON content."""
        return self.model_dump(mode="json", exclude={"model": {"alias"}})

    def point_id(self) -> str:
        """Hash of everything but seed and learning rate: runs that share it are one point of a plot."""
        content = self.identity()
        del content["seed"], content["train"]["lr"]
        return digest(content)


def digest(content: Any) -> str:
    """Twelve hex digits that identify JSON content."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_id(spec: RunSpec, code: str) -> str:
    """The identity of a run: hash of the spec, seed included, and of the code of its mixers and task."""
    return digest({"spec": spec.identity(), "code": code})
