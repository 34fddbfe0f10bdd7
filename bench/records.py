"""The schema of what a run leaves behind: `record.json`, field by field. `results/README.md` is generated from it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bench.spec import RunSpec

SCHEMA_VERSION = 1

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


class Timing(Strict):
    """Times of one call, in microseconds."""

    median_us: float
    low_us: float
    """The 20 % quantile."""
    high_us: float
    """The 80 % quantile."""
    n: int
    """Times behind the quantiles: replays of a graph, or loops of eager calls."""


class GateResult(Strict):
    """Whether what was timed is right: compared with its definition on fresh random input, in single or double precision."""

    passed: bool
    against: str
    """The definition, its precision, and the shape that was compared."""
    worst: str
    """The output or gradient with the largest error relative to its tolerance."""
    error: float | None
    """Its root mean square error relative to the definition's size; None if it was not finite or never compared."""
    tolerance: float


class Bound(Strict):
    """The least time that the device allows, by the bytes and operations of the definition."""

    bytes: int
    """Every input, output and gradient once."""
    flops: int
    """Multiplications and additions; matrix states are counted in chunks of 64 tokens."""
    microseconds: float
    """The larger of bytes over the copy rate and operations over the rate of a matrix product."""
    by: Literal["bytes", "flops"]


class Peer(Strict):
    """A public implementation of the same operation, on the same inputs in the same run."""

    name: str
    version: str
    eager: Timing | None = None
    graph: Timing | None = None
    first_call_seconds: float | None = None
    error: float | None = None
    """Its own error in the correctness gate."""
    reason: str = ""
    """Why it has no time."""


class SpeedRecord(Strict):
    """How fast one mixer or kernel is in one mode at one shape."""

    schema_version: int = SCHEMA_VERSION
    speed_id: str
    """Hash of subject, mode, shape, precision and device: a new measurement replaces an older one."""
    subject: Literal["mixer", "kernel"]
    name: str
    """The mixer as written on the command line, or a kernel of `bench list kernels`."""
    mode: Literal["forward", "train", "prefill", "decode"]
    """Forward alone, forward and backward, a prompt that leaves a state, or one token after a state."""
    shape: dict[str, int]
    """Batch, length, and whatever else the subject has: model width, heads, widths of keys and values."""
    dtype: str
    path: str
    """The form that ran: "triton", "chunked" or "reference" as `kernels.dispatch` chose, or "torch"."""
    status: Literal["done", "wrong", "failed", "oom"]
    """"wrong" is a red correctness gate, which leaves no times."""
    reason: str = ""
    gate: GateResult
    bound: Bound
    graph: Timing | None = None
    """Replays of a CUDA graph with the L2 cache flushed: what the kernels cost. None on a CPU."""
    eager: Timing | None = None
    """Calls from Python one after the other: what a user waits."""
    tokens_per_second: float | None = None
    """By the graph time, or by the eager one where there is no graph."""
    first_call_seconds: float | None = None
    """Of the first call in this process, compilation included; None where an earlier row had compiled it."""
    peak_memory_bytes: int | None = None
    """Peak device memory of one eager call, its inputs included; None on a CPU."""
    state_bytes: int | None = None
    """What decoding keeps for one sequence at this length, where the subject has a state."""
    peers: list[Peer] = Field(default_factory=list)
    copy_bytes_per_second: float
    """Rate of a device copy, read and written, measured in the same run."""
    product_flops_per_second: float
    """Rate of a large matrix product in `product_dtype`, measured in the same run."""
    product_dtype: str
    device: str
    started: str
    """UTC, ISO 8601."""
    provenance: Provenance

    def timing(self) -> Timing | None:
        """The graph time, or the eager one where there is no graph."""
        return self.graph or self.eager

    def bound_ratio(self) -> float | None:
        """Time over the bound."""
        timing = self.timing()
        return None if timing is None or not self.bound.microseconds else timing.median_us / self.bound.microseconds

    def best_peer(self) -> Peer | None:
        """The fastest peer that is right, by the clock that `timing` reads."""
        clock = "graph" if self.graph else "eager"
        timed = [peer for peer in self.peers if getattr(peer, clock) is not None]
        return min(timed, key=lambda peer: getattr(peer, clock).median_us, default=None)

    def peer_ratio(self) -> float | None:
        """Time of the best peer over ours: above 1 ours is faster."""
        peer, timing = self.best_peer(), self.timing()
        if peer is None or timing is None:
            return None
        best = peer.graph if self.graph else peer.eager
        assert best is not None
        return best.median_us / timing.median_us


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
    """Kernel backend that was really used."""
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
    """Training time divided among the fleet's members."""
    wall_seconds: float = 0.0
    """From the start of the fleet to this record, not divided."""
    examples_per_second: float | None = None
    """Training examples over `train_seconds`, evaluation left out."""
    peak_memory_bytes: int | None = None
    """Peak device memory on a GPU, peak resident memory of the process on a CPU."""
    provenance: Provenance

    def metric(self, split: str, name: str, slice_: str = "mean") -> float | None:
        """The value of one metric, or None."""
        for item in self.metrics:
            if (item.split, item.name, item.slice) == (split, name, slice_):
                return item.value
        return None
