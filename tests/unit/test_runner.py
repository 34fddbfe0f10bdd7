"""What becomes of runs: records, failures with their reasons."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import failures, runner
from bench.fleet import StackedFleet
from bench.launch.local import LocalWorkers, worker_devices
from bench.model import LanguageModel
from bench.records import RunRecord
from bench.spec import RunSpec, TaskSpec
from bench.store import Store
from tests.unit.small_runs import CPU, execute, spec


def test_members_are_ordinary_records(tmp_path: Path) -> None:
    first, second = execute(tmp_path, spec(), spec(seed=1))
    assert Store(tmp_path).load()[0] in ([first, second], [second, first])
    assert (first.fleet_size, first.execution) == (2, "eager")
    assert first.train_seconds == pytest.approx(second.train_seconds)
    assert first.metric("test", "accuracy") is not None
    assert Store(tmp_path).curve(second.run_id) is not None


def test_a_record_that_cannot_be_read_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    (record,) = execute(tmp_path, spec())
    path = Store(tmp_path).path(record.run_id) / "record.json"
    newer = path.read_text().replace('"schema_version": 1', '"schema_version": 9')
    path.write_text(newer)
    (again,) = execute(tmp_path, spec())
    assert Store(tmp_path).read(record.run_id) == again
    assert path.with_name("record.json.unreadable").read_text() == newer


def test_a_split_that_cannot_be_drawn_is_a_failed_run(tmp_path: Path) -> None:
    cells = {"vocab_size": 6, **{f"{split}_cells": "4x1:64" for split in ("train", "valid", "test")}}
    (record,) = execute(tmp_path, spec().model_copy(update={"task": TaskSpec(name="mqar", options=cells)}))
    assert (record.status, set(record.data_hashes)) == ("failed", {"train"})
    assert "too few distinct examples" in record.reason


def test_a_run_whose_record_cannot_be_made_leaves_its_neighbour_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], runner.make_record

    def once(run: RunSpec, *rest: Any) -> RunRecord:
        if run.seed == 0 and not made:
            made.append(run)
            raise ValueError("no ceilings")
        return real(run, *rest)

    monkeypatch.setattr(runner, "make_record", once)
    records = execute(tmp_path, spec(), spec(seed=1))
    assert [record.status for record in records] == ["done", "done"]


def test_a_death_does_not_replace_a_record(tmp_path: Path) -> None:
    (record,) = execute(tmp_path, spec())
    assert runner.record_death(spec(), CPU, Store(tmp_path), "signal 9") == record
    assert Store(tmp_path).read(record.run_id) == record
    late = runner.record_death(spec(), CPU, Store(tmp_path), "signal 9", outdated=record.digest())
    assert late is not None
    assert late.status == "failed"


def test_divergence_is_a_record_with_its_reason(tmp_path: Path) -> None:
    diverged, fine = execute(tmp_path, spec(lr=1e30, weight_decay=0.0), spec(weight_decay=0.0))
    assert diverged.status == "diverged"
    assert "lr 1e+30" in diverged.reason
    assert diverged.metric("valid", "accuracy") is None
    assert Store(tmp_path).read(diverged.run_id) == diverged
    assert fine.status == "done"


def test_failure_is_a_record_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the mixer is\nbroken")

    monkeypatch.setattr(LanguageModel, "hidden", broken)
    for record in execute(tmp_path, spec(), spec(seed=1)):
        assert (record.status, record.reason) == ("failed", "RuntimeError: the mixer is broken")


@pytest.mark.parametrize(
    ("fits", "status", "sizes", "parts"), [(0.5, "done", {1, 2}, 1), (0.25, "done", {1}, 4), (0, "oom", {1}, 8)]
)
def test_out_of_memory_halves_the_fleet_then_the_batch_then_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: float, status: str, sizes: set[int], parts: int
) -> None:
    """A real out-of-memory needs a GPU that is too small, so the error is raised by hand; `fits` counts batches of a run."""
    original = StackedFleet.step_on
    errors = itertools.cycle(map(error_of_memory, range(4)))

    def limited(self: StackedFleet, *arguments: object) -> None:
        limit = 2 if fits == 0.5 else fits
        if len(self.model) / self.micro_batches > limit:
            raise next(errors)
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StackedFleet, "step_on", limited)
    records = execute(tmp_path, *(spec(seed=seed) for seed in range(3)))
    assert {record.status for record in records} == {status}
    assert {record.fleet_size for record in records} == sizes
    assert max(record.micro_batches for record in records) == parts


def error_of_memory(kind: int) -> RuntimeError:
    """What torch, its driver's and Triton's launches say where memory is short."""
    words = (
        "CUDA error: out of memory\nSearch for it",
        "Triton Error [CUDA]: out of memory",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    )
    return RuntimeError(words[kind - 1]) if kind else torch.OutOfMemoryError("out of memory")


def test_a_fleet_is_gone_before_the_next_one_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU its graphs hold the memory of a step. A fleet of two does not fit; in the next sweep one of two diverges."""
    fleets, seen = weakref.WeakSet[StackedFleet](), []
    made, stepped = StackedFleet.__init__, StackedFleet.step_on

    def noted(self: StackedFleet, *arguments: Any, **named: Any) -> None:
        seen.append(len(fleets))
        fleets.add(self)
        made(self, *arguments, **named)

    def limited(self: StackedFleet, *arguments: Any) -> None:
        if len(self.model) > 1:
            raise error_of_memory(0)
        stepped(self, *arguments)

    monkeypatch.setattr(StackedFleet, "__init__", noted)
    gc.disable()
    try:
        with monkeypatch.context() as small:
            small.setattr(StackedFleet, "step_on", limited)
            execute(tmp_path / "small", spec(), spec(seed=1))
        execute(tmp_path / "diverged", spec(lr=1e30, weight_decay=0.0), spec(weight_decay=0.0))
    finally:
        gc.enable()
    assert seen == [0] * 5


def test_a_process_whose_device_is_lost_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runs are not recorded: they are no worse than any other."""

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(LanguageModel, "hidden", broken)
    monkeypatch.setattr(failures, "_computes", lambda _: False)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as end:
        execute(tmp_path, spec(), spec(seed=1))
    assert end.value.code == failures.BROKEN
    assert Store(tmp_path).load()[0] == []


@pytest.mark.parametrize(("held", "size"), [([9, 9, 1], 3), ([9] * 99, 2)])
def test_memory_that_others_hold_is_waited_for_before_a_fleet_is_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int], size: int
) -> None:
    """Others hold so many GiB at each look; while they hold more than one, three models do not fit."""
    original, looks, now = StackedFleet.step_on, iter(held), [9]

    def look(_: torch.device) -> int:
        now[0] = next(looks)
        return now[0] << 30

    def limited(self: StackedFleet, *arguments: object) -> None:
        if len(self.model) > 2 and now[0] > 1:
            raise error_of_memory(0)
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(failures, "taken_by_others", look)
    monkeypatch.setattr(failures, "LOOK_SECONDS", 0.002)
    monkeypatch.setattr(failures, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(failures, "PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr(StackedFleet, "step_on", limited)
    records = execute(tmp_path, *(spec(seed=seed) for seed in range(3)))
    assert {record.status for record in records} == {"done"}
    assert max(record.fleet_size for record in records) == size


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    with LocalWorkers(["cpu"], tmp_path) as workers:
        workers.submit((spec(epochs=100000), spec(epochs=100000, seed=1)), {})
        kinds = []
        while "progress" not in kinds:
            kinds += [event.kind for event in workers.events(1.0)]
        workers.workers[0].process.kill()
        while "died" not in kinds:
            kinds += [event.kind for event in workers.events(1.0)]
        assert workers.idle() == 1
    record = runner.record_death(spec(), CPU, Store(tmp_path), "signal 9")
    assert record is not None
    assert (record.status, record.reason) == ("failed", "its worker process died twice (signal 9)")


@pytest.mark.parametrize(
    ("visible", "device", "seen"), [(None, "cuda:1", "1"), ("3,5", "cuda:1", "5"), ("GPU-a, GPU-b", "cuda:0", "GPU-a")]
)
def test_a_worker_sees_its_own_gpu_as_the_first(
    visible: str | None, device: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started: list[tuple[str, str | None]] = []

    class Process:
        def __init__(self, args: tuple, **_: object) -> None:
            self.device = args[1]

        def start(self) -> None:
            started.append((self.device, os.environ.get("CUDA_VISIBLE_DEVICES")))

    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Process", Process)
    LocalWorkers([device], Path())._start(device)
    assert started == [("cuda:0", seen)]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.parametrize(
    ("device", "jobs", "cores", "compiled", "found"),
    [
        ("cpu", None, 3, "1", ["cpu"] * 3),
        ("cpu", 2, 3, "1", ["cpu"] * 2),
        ("cuda", None, 16, "1", ["cuda:0", "cuda:1"] * 4),
        ("cuda", None, 64, "1", ["cuda:0", "cuda:1"] * 6),
        ("cuda", None, 3, "1", ["cuda:0", "cuda:1"]),
        ("cuda", None, 64, "0", ["cuda:0", "cuda:1"]),
        ("cuda", 3, 64, "1", ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:1", None, 8, "1", ["cuda:1"] * 4),
    ],
)
def test_workers_of_a_device(
    device: str, jobs: int | None, cores: int, compiled: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.launch.local.usable_cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("BENCH_COMPILE", compiled)
    assert worker_devices(device, jobs) == found


def test_a_worker_that_cannot_start_is_no_fault_of_its_runs(tmp_path: Path) -> None:
    """A script without a guard starts a sweep in each of its own workers too, which ends them."""
    script = tmp_path / "sweep.py"
    script.write_text(
        "import pathlib, sys\n"
        "from bench.launch.local import LocalWorkers\n"
        "from tests.unit.small_runs import spec\n"
        "with LocalWorkers(['cpu'], pathlib.Path(sys.argv[1])) as workers:\n"
        "    workers.submit((spec(),), {})\n"
        "    print([(event.kind, str(event.content)) for event in workers.events(60.0)])\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "store")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, capture_output=True, text=True, check=False)
    assert "('broken', 'A worker process could not start (exit code 1)" in done.stdout, done.stderr
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").glob("*/record.json"))
