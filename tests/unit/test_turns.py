"""Turns on a shared GPU: how many train at a time, between threads and processes, and what waiting ends with."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bench import stacked
from bench.fleet import StackedFleet
from bench.train import FleetTrainer, Interrupted
from bench.turns import AT_A_TIME, Turn
from tests.unit.small_runs import CPU, finish, spec

HOLD = "import sys, time; from pathlib import Path; from bench.turns import Turn; turn = Turn('gpu', Path(sys.argv[1]))"
HOLD += "; turn.take(lambda: False); print('held', flush=True); time.sleep(60)"


def free(folder: Path, gpu: str = "gpu") -> int:
    """Turns that are to be had at once."""
    turns = [Turn(gpu, folder) for _ in range(AT_A_TIME + 1)]
    try:
        return sum(turn.take(iter([False, True]).__next__) for turn in turns)
    finally:
        for turn in turns:
            turn.give()


def test_so_many_train_on_a_gpu_at_a_time(tmp_path: Path) -> None:
    assert free(tmp_path) == AT_A_TIME
    with Turn("gpu", tmp_path) as turn:
        assert turn.take(lambda: False)
        assert turn.take(lambda: False)  # it has one already
        assert free(tmp_path) == AT_A_TIME - 1
        assert free(tmp_path, "another") == AT_A_TIME
    assert free(tmp_path) == AT_A_TIME


def test_who_has_waited_longest_is_next(tmp_path: Path) -> None:
    holders = [Turn("gpu", tmp_path) for _ in range(AT_A_TIME)]
    assert all(holder.take(lambda: False) for holder in holders)
    (tmp_path / "gpu.queue.0.1").touch()  # of a process that was killed
    order: list[int] = []

    def wait(number: int) -> None:
        with Turn("gpu", tmp_path) as turn:
            assert turn.take(lambda: False)
            order.append(number)
            time.sleep(0.1)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(4)]
    for number, thread in enumerate(threads):
        thread.start()
        while len(list(tmp_path.glob(f"gpu.queue.*.{os.getpid()}"))) <= number:
            time.sleep(0.01)
    holders[0].give()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]
    assert not list(tmp_path.glob("gpu.queue.*"))
    holders[1].give()


def test_a_killed_process_gives_its_turn_back(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert free(tmp_path) == AT_A_TIME - 1
        process.kill()
    assert free(tmp_path) == AT_A_TIME


def test_a_compiled_fleet_rehearses_without_a_turn_and_trains_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also once it has got smaller, which compiles again."""
    monkeypatch.setattr(stacked, "compile_for_cells", lambda function: function)
    monkeypatch.setattr("bench.fleet.compile_for_cells", lambda function: function)
    monkeypatch.setattr(FleetTrainer, "_pays", lambda self, share: True)
    pair = [spec(epochs=3), spec(epochs=3, seed=1)]
    turn, seen = Turn("gpu", tmp_path), []

    def watched(name: str) -> None:
        method = getattr(StackedFleet, name)

        def call(self: StackedFleet, cell: int) -> None:
            seen.append((name, len(self.model), free(tmp_path)))
            method(self, cell)

        monkeypatch.setattr(StackedFleet, name, call)

    watched("rehearse")
    watched("advance")
    trainer = FleetTrainer(pair, CPU, compiled=True)
    trainer.members[0].diverged = True
    with turn:
        curves = [trainer.members[index].curve for index in trainer.run(turn=turn)]
    assert [len(curve) for curve in curves] == [3]
    assert {seen_ for seen_ in seen if seen_[0] == "rehearse"} == {("rehearse", size, AT_A_TIME) for size in (2, 1)}
    assert {seen_ for seen_ in seen if seen_[0] == "advance"} == {("advance", size, AT_A_TIME - 1) for size in (2, 1)}
    assert free(tmp_path) == AT_A_TIME


def test_a_stop_ends_the_wait_with_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "compile_for_cells", lambda function: function)
    monkeypatch.setattr("bench.fleet.compile_for_cells", lambda function: function)
    others = [Turn("gpu", tmp_path) for _ in range(AT_A_TIME)]
    assert all(other.take(lambda: False) for other in others)
    trainer, until = FleetTrainer([spec()], CPU, compiled=True), time.monotonic() + 0.3
    with pytest.raises(Interrupted) as stop, Turn("gpu", tmp_path) as turn:
        next(trainer.run(turn=turn, should_stop=lambda: time.monotonic() > until))
    for other in others:
        other.give()
    ((got, curve),) = finish(FleetTrainer([spec()], CPU, checkpoints=stop.value.checkpoints))
    ((want, want_curve),) = finish(FleetTrainer([spec()], CPU))
    assert curve == want_curve
    assert all(torch.equal(got[key], value) for key, value in want.items())
