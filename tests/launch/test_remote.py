"""What a driver does about jobs elsewhere, with an engine that only pretends."""

from __future__ import annotations

from pathlib import Path

from bench.launch import LaunchError
from bench.launch.remote import End, Job, RemoteWorkers
from tests.unit.small_runs import spec


class Pretending(RemoteWorkers[int]):
    """Jobs are numbers; the first could not run, and the others go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__("cpu", 1, folder, folder / "sweep.json")
        self.started, self.cancelled, self.closed = 0, list[int](), False

    def slots(self) -> int:
        return 3

    def start(self, job: Job) -> int:
        self.started += 1
        return self.started

    def ended(self, handle: int) -> End | None:
        if handle == 1:
            raise LaunchError("A job could not train.")
        return None

    def cancel(self, handle: int) -> None:
        if handle == 3:
            raise RuntimeError("the engine has gone away")
        self.cancelled.append(handle)

    def close(self) -> None:
        self.closed = True


def test_a_job_that_could_not_run_does_not_keep_others_from_being_cancelled(tmp_path: Path) -> None:
    workers = Pretending(tmp_path)
    for seed in (0, 1):
        workers.submit((spec(seed=seed),), {})
    workers.stop()
    assert workers.cancelled == [2] and workers.closed and not workers.flights


def test_what_an_engine_lent_is_given_back_whatever_happens(tmp_path: Path) -> None:
    workers = Pretending(tmp_path)
    for seed in (0, 1, 2):
        workers.submit((spec(seed=seed),), {})
    try:
        workers.stop()
    except RuntimeError:
        assert workers.closed and workers.cancelled == [2]
    else:
        raise AssertionError("the fault was swallowed")
