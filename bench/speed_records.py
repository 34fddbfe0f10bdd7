"""The schema of `bench throughput`: one JSON file a row, `STORE/speed/<speed_id>.json`, described in `results/README.md`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bench.records import SCHEMA_VERSION, Provenance, Strict


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
