"""The schema of what runs and evaluations leave behind, field by field. `results/README.md` is generated from it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bench.spec import RunSpec, digest

SCHEMA_VERSION = 1
EVAL_SCHEMA_VERSION = 1

Status = Literal["done", "diverged", "failed", "oom"]


class Strict(BaseModel):
    """Base of all record parts: unknown fields are an error and NaN cannot be written."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Metric(Strict):
    """One measured value."""

    split: Literal["valid", "test"]
    name: str
    """"accuracy" (for real-valued labels the share of the squared error of predicting zero that is removed, at least 0),
    "loss", "rate:<lure>" (how often a named wrong answer was given), "mse", or a metric of the task's own, such as
    "binding gain" or "effective memory length"."""
    slice: str
    """"mean" (equal mean over the cells), a cell's name, or "<cell>/<group>"."""
    value: float | None
    """None where the run produced no finite number."""
    n: int
    """Examples behind the value."""
    stderr: float | None = None
    stderr_kind: str = ""
    """What the standard error runs over, e.g. "examples"."""


class CellInfo(Strict):
    """A test cell and its exact ceilings."""

    name: str
    axes: dict[str, float]
    ceilings: dict[str, float]
    """Accuracy of solvers that do not solve the task, by name; "exact" is that of the exact solver where it misses labels."""
    bits_needed: float
    """Bits that a causal state must hold to answer every query of the cell."""
    trained: bool = True
    """Whether the cell lies within the trained range of every axis."""


class StateInfo(Strict):
    """The memory that decoding needs, all layers together, per sequence."""

    seq_len: int
    """The longest test length; growing caches are counted there."""
    dtype: str
    true_bytes: int
    """Counted from the tensors of `init_state`."""
    published_bytes: int
    """As the papers and Zoology's plots count: fp32, no convolution tails inside mixers."""
    read_bytes: int
    """Bytes touched to decode one token; smaller than `true_bytes` for sparse reads."""


class Provenance(Strict):
    """Where a number comes from."""

    commit: str | None
    dirty: bool | None
    diff_hash: str | None
    """Hash of the uncommitted changes, None if there are none."""
    code: dict[str, str]
    """Hash of the source of each mixer, task and shared module that took part."""
    versions: dict[str, str]
    hardware: dict[str, str]
    command: str


class RunRecord(Strict):
    """One run."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    spec: RunSpec
    role: Literal["select", "report"]
    status: Status
    reason: str = ""
    """Why a run is not done, one sentence."""
    mixer: str
    """Name of the mixer under test: the mixer of the last layer."""
    label: str
    """The layers as written on the command line."""
    family: str = ""
    """The family that the task is scored with: "recall", "selectivity", "mad" or "state_tracking"."""
    parameters: int
    state: StateInfo
    cells: list[CellInfo]
    """The test cells."""
    metrics: list[Metric] = Field(default_factory=list)
    data_hashes: dict[str, str] = Field(default_factory=dict)
    """Digest of each split's bytes."""
    device: str
    precision: str
    backend: str
    """Kernels that could run: "torch", or "triton where it fits" by `kernels.dispatch`; older records all say "torch"."""
    execution: str = "eager"
    """How training steps ran: "eager", "CUDA graph", or "compiled, CUDA graph"."""
    fleet_size: int = 1
    """Runs that were trained together as one batched model, this one included; times are a run's share of theirs."""
    micro_batches: int = 1
    """Parts that each batch was split into because it did not fit the memory whole."""
    epochs_run: int = 0
    steps_run: int = 0
    started: str
    """UTC, ISO 8601."""
    train_seconds: float = 0.0
    """Training time divided among the fleet's members, compiling and waiting for a shared GPU left out."""
    wall_seconds: float = 0.0
    """From the start of the fleet to this record, not divided."""
    examples_per_second: float | None = None
    """Training examples over `train_seconds`, evaluation left out."""
    peak_memory_bytes: int | None = None
    """Peak device memory on a GPU, peak resident memory of the process on a CPU."""
    provenance: Provenance

    def digest(self) -> str:
        """Tells this record from another of the same run."""
        return digest(self.model_dump(mode="json"))

    def metric(self, split: str, name: str, slice_: str = "mean") -> float | None:
        """The value of one metric, or None."""
        for item in self.metrics:
            if (item.split, item.name, item.slice) == (split, name, slice_):
                return item.value
        return None


class JudgedModel(Strict):
    """A language model that was evaluated."""

    fingerprint: str
    """Hash of weights and configuration, "hub id@revision" for a model of the hub, or what a referee model is made of."""
    name: str
    """As it is shown in tables."""
    kind: Literal["plain", "converted", "control", "window", "ablation"]
    """A model as it is; a converted one; the teacher put through stages of a recipe; window and sinks without training; one
    branch of a converted one."""
    source: str
    """As the user named it."""
    teacher: str | None = None
    """Fingerprint of the teacher, where there is one."""
    referees: dict[str, str] = Field(default_factory=dict)
    """Of a converted model: fingerprints of the rows that stand beside it: teacher, window, window_only, mixer_only."""
    parameters: int
    mixer: str | None = None
    """Mixer of the converted layers."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the mixer."""
    window: int | None = None
    sinks: int | None = None
    combine: str | None = None
    layers: int
    layers_converted: int = 0
    conversion: dict[str, Any] = Field(default_factory=dict)
    """What the converted model says of itself: recipe, tokens, seed, hash of the data."""


class EvalMetric(Strict):
    """One value of an evaluation."""

    name: str
    """As lm-eval names it ("acc", "exact_match"), or a measurement: "state_bytes", "prefill_tokens_per_second",
    "decode_tokens_per_second", "peak_memory_bytes", "kl", "top1", "ppl"."""
    filter: str = "none"
    """lm-eval's filter of the answers."""
    slice: str = ""
    """"" for all items, else a length in tokens, or "batch 1, context 1024"."""
    value: float | None
    stderr: float | None = None
    n: int
    """Items, sequences or repetitions behind the value."""
    higher_is_better: bool | None = None


class AnswerCount(Strict):
    """How often one answer of a multiple choice was given and was right."""

    answer: str
    """Its letter or place: A, B, ..."""
    chosen: int
    correct: int


class EvalRecord(Strict):
    """One model on one task."""

    schema_version: int = EVAL_SCHEMA_VERSION
    eval_id: str
    model: JudgedModel
    task: str
    """A task of lm-eval, or a measurement: "memory_and_speed" or "agreement"."""
    group: str = ""
    """lm-eval's group that the task was asked for with, such as "mmlu"."""
    protocol: Literal["log-likelihood", "generated", "measured"]
    version: str
    """Of the task's definition."""
    fewshot: int = 0
    chat: bool = False
    limit: int | None = None
    """Items per task, or per task and length; None for all."""
    lengths: list[int] = Field(default_factory=list)
    items: int
    """Items evaluated."""
    items_total: int
    """Items that the task has."""
    items_hash: str = ""
    """Hash of the items in their order; rows with different hashes must not be compared."""
    primary: str
    """Name of the metric that stands for the task."""
    chance: float | None = None
    """The primary metric of a guess."""
    metrics: list[EvalMetric]
    answers: list[AnswerCount] = Field(default_factory=list)
    """Multiple choice: a model that always says "A" shows here."""
    device: str
    precision: str
    batch_size: str
    max_length: int
    seconds: float
    started: str
    """UTC, ISO 8601."""
    provenance: Provenance

    def metric(self, name: str, slice_: str = "") -> EvalMetric | None:
        """One metric, or None."""
        return next((item for item in self.metrics if (item.name, item.slice) == (name, slice_)), None)
