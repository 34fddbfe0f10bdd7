"""One row of `bench throughput` from plan to record: correctness gate, first call, times, memory, peers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

import torch

from bench import provenance
from bench.outcome import hardware
from bench.spec import digest
from bench.speed_records import Bound, GateResult, Peer, SpeedRecord
from bench.throughput import clock, peers
from bench.throughput.bounds import Cost
from bench.throughput.plan import Row
from bench.throughput.problem import Function, Problem, Tensors, check, weights_for
from bench.throughput.subjects import KernelRow, MixerRow
from bench.throughput.tuning import tune_by_width
from kernels.dispatch import watched

PEER_GATE_BATCH = 8
"""At most, as the token loops of a definition in double precision need memory."""
UNCHECKED = GateResult(passed=False, against="", worst="", error=None, tolerance=0.0)


class Session:
    """What the rows of one command share: the device, its ceilings, and the gates that were passed.

    Args:
        device: where to run.
        with_peers: whether public peers are timed.
    """

    def __init__(self, device: torch.device, *, with_peers: bool) -> None:
        self.device, self.with_peers = device, with_peers
        if with_peers and device.type == "cuda":
            tune_by_width()
        self.ceilings = clock.ceilings(device)
        self.hardware = hardware(device)
        self.generator = torch.Generator(device)
        self.gates: dict[tuple[Any, ...], GateResult] = {}
        self.lost = False
        """Whether an error left the device unusable, so that no later row of this process can be measured."""

    def measure(self, row: Row) -> SpeedRecord:
        """Measures a row; a wrong result, an error or a lack of memory is a record too, and has no times."""
        subject = KernelRow(row, self) if row.kind == "kernel" else MixerRow(row, self)
        record = self._record(row)
        try:
            subject.prepare()
            record = record.model_copy(update=subject.facts())
            problem, call, first = self._first(row, subject)
            gate = self._gate(row, subject)
            record = record.model_copy(update={"gate": gate})
            if not gate.passed:
                return record.model_copy(update={"status": "wrong", "reason": wrong_text(gate)})
            return record.model_copy(update=first | self._times(row, subject, problem, call))
        except torch.OutOfMemoryError:
            return record.model_copy(update={"status": "oom", "reason": "The device ran out of memory."})
        except Exception as error:
            return record.model_copy(update={"status": "failed", "reason": one_line(error)})
        finally:
            del subject
            self._tidy()

    def _tidy(self) -> None:
        """Gives memory back; this is where an error that a kernel left behind shows at the latest."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError:
                self.lost = True

    def _record(self, row: Row) -> SpeedRecord:
        """A record without results."""
        chip = self.hardware.get("gpu", self.hardware["cpu"])
        identity = {"kind": row.kind, "name": row.name, "mode": row.mode, "shape": row.sizes(), "dtype": row.dtype, "chip": chip}
        return SpeedRecord(
            speed_id=digest(identity),
            subject=row.kind,
            name=row.name,
            mode=row.mode,
            shape=row.sizes(),
            dtype=row.dtype,
            path="",
            status="done",
            gate=UNCHECKED,
            bound=Bound(bytes=0, flops=0, microseconds=0.0, by="bytes"),
            copy_bytes_per_second=self.ceilings.copy_bytes_per_second,
            product_flops_per_second=self.ceilings.product_flops_per_second,
            product_dtype=self.ceilings.product_dtype,
            device=str(self.device),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            provenance=provenance.collect_speed([layer.mixer for layer in row.layers], self.hardware),
        )

    def bound(self, cost: Cost) -> Bound:
        """A cost at the ceilings of this run."""
        by_bytes, by_flops = cost.seconds(self.ceilings.copy_bytes_per_second, self.ceilings.product_flops_per_second)
        by = "bytes" if by_bytes >= by_flops else "flops"
        return Bound(bytes=cost.bytes, flops=cost.flops, microseconds=1e6 * max(by_bytes, by_flops), by=by)

    def _gate(self, row: Row, subject: KernelRow | MixerRow) -> GateResult:
        """The correctness gate; rows that differ in batch and length only share it."""
        key = (row.kind, row.name, row.mode, row.heads if row.kind == "mixer" else 0, row.width, row.dtype, subject.few_of_many)
        if key not in self.gates:
            seed = secrets.randbits(32)
            self.generator.manual_seed(seed)
            problem, against = subject.gated()
            self.gates[key] = check(problem, gradients=row.mode == "train", against=f"{against}, fp64, seed {seed}")
        return self.gates[key]

    def _first(self, row: Row, subject: KernelRow | MixerRow) -> tuple[Problem, Callable[[], Tensors], dict[str, Any]]:
        """The problem, its call, the seconds until its first result, and the form that ran; nothing was compiled before."""
        problem = subject.full()
        clock.synchronize(self.device)
        began = time.perf_counter()
        with watched() as seen:
            call = timed_call(problem, gradients=row.mode == "train")
            call()
        clock.synchronize(self.device)
        return problem, call, {"first_call_seconds": time.perf_counter() - began, "path": path_text(seen)}

    def _times(self, row: Row, subject: KernelRow | MixerRow, problem: Problem, call: Callable[[], Tensors]) -> dict[str, Any]:
        """Everything that is measured with clocks, and whether the outputs at the timed shape are finite."""
        with clock.peak_memory(self.device) as peak:
            outputs = call()
        is_finite = all(torch.isfinite(x).all() for x in outputs.values())
        del outputs  # with their graph, whose ends belong to this stream and would break the capture on another
        if not is_finite:
            return {"status": "wrong", "reason": "The results at the timed shape are not finite.", "first_call_seconds": None}
        found: dict[str, Any] = {
            "peak_memory_bytes": peak[0] if peak else None,
            "eager": clock.eager(call, self.device),
        }
        if self.device.type == "cuda":
            found["graph"] = clock.replays(call)
        clocked = found.get("graph") or found["eager"]
        tokens = row.batch * (1 if row.mode == "decode" else row.length)
        found["tokens_per_second"] = tokens / clocked.median_us * 1e6
        if self.with_peers and isinstance(subject, KernelRow):
            found["peers"] = [self._peer(row, subject, problem, peer) for peer in peers.peers_of(cast(Any, row.name), row.mode)]
        return found

    def _peer(self, row: Row, subject: KernelRow, problem: Problem, peer: peers.PublicPeer) -> Peer:
        """Times a peer on the same inputs, then checks it on the small problem."""
        gradients = row.mode == "train"
        record = Peer(name=peer.name, version=peers.installed(peer.package) or "")
        try:
            began = time.perf_counter()
            call = timed_call(problem, gradients=gradients, function=peer.function)
            call()
            clock.synchronize(self.device)
            first = time.perf_counter() - began
            times: dict[str, Any] = {"first_call_seconds": first, "eager": clock.eager(call, self.device)}
            if self.device.type == "cuda":
                times["graph"] = clock.replays(call)
            result = self._peer_gate(row, subject, peer)
        except Exception as error:
            return record.model_copy(update={"reason": one_line(error)})
        if not result.passed:
            return record.model_copy(update={"error": result.error, "reason": wrong_text(result)})
        return record.model_copy(update=times | {"error": result.error})

    def _peer_gate(self, row: Row, subject: KernelRow, peer: peers.PublicPeer) -> GateResult:
        """The gate of a peer, with the row's heads and at best its batch, since public kernels compile and tune anew for others."""
        key = (peer.name, row.name, row.mode, row.heads, row.width, row.dtype)
        if key not in self.gates:
            small, against = subject.small(min(row.batch, PEER_GATE_BATCH), row.heads)
            if peer.equals is not None:
                small = replace(small, definition=partial(peer.equals, small.definition))
            self.gates[key] = check(small, gradients=row.mode == "train", against=against, function=peer.function)
        return self.gates[key]


def timed_call(problem: Problem, *, gradients: bool, function: Function | None = None) -> Callable[[], Tensors]:
    """The call on the problem's inputs; with gradients, forward and backward for all that is learned."""
    function = function or problem.call
    inputs = {name: x.detach().requires_grad_(name in problem.learned) for name, x in problem.inputs.items()}
    inputs |= {name: x for name, x in problem.inputs.items() if isinstance(x, torch.nn.Parameter)}

    @torch.no_grad()
    def forward() -> Tensors:
        return function(inputs)

    if not gradients:
        return forward
    weights, learned = weights_for(function(inputs)), [inputs[name] for name in problem.learned]

    def both() -> Tensors:
        outputs = function(inputs)
        torch.autograd.grad(list(outputs.values()), learned, weights, allow_unused=True)
        return outputs

    return both


def path_text(seen: dict[str, str]) -> str:
    """The forms that ran: one word where they agree, else by operation."""
    forms = sorted(set(seen.values()))
    if len(forms) < 2:
        return forms[0] if forms else "torch"
    return ", ".join(f"{operation} {form}" for operation, form in seen.items())


def wrong_text(gate: GateResult) -> str:
    """Why a gate is red."""
    if gate.error is None:
        return f"{gate.worst} is not finite; its definition is."
    return f"{gate.worst} is off by {gate.error:.1e} of its size; {gate.tolerance:.0e} is allowed."


def one_line(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:300]
