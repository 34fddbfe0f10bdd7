"""Worker processes of this machine that are killed at awkward moments, and code that changes while a sweep runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import catalog
from bench.launch import Event, LaunchError
from bench.launch.handed import pack, unpack
from bench.launch.local import MAX_LOST_STARTS, LocalWorkers, _Worker
from bench.store import Store
from tests.cli.test_bad_input import MIXER
from tests.unit.small_runs import spec


class Unstarted(LocalWorkers):
    """Workers whose processes are only told of: each has ended already, in a way of its own."""

    def __init__(self, store: Path, *codes: int, said: bytes = b"") -> None:
        super().__init__(["cpu"], store)
        self.codes, self.said = list(codes), said
        self.workers = [self._start("cpu")]

    def _start(self, device: str) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        os.write(theirs.fileno(), self.said)
        self.others = theirs
        process = SimpleNamespace(exitcode=self.codes.pop(0), join=lambda *_: None, is_alive=lambda: False)
        return _Worker(process, ours)  # type: ignore[arg-type]

    def next_event(self) -> Event:
        """What becomes of a fleet whose worker ends now."""
        if not self.busy():
            self.submit((spec(),), {})
            self.others.recv()  # a pipe that is closed with words unread is reset, and not at its end
        self.others.close()
        (event,) = self.events(5.0)
        return event


def test_a_worker_that_died_idle_is_replaced(tmp_path: Path) -> None:
    with LocalWorkers(["cpu"], tmp_path) as workers:
        workers.submit((spec(epochs=1),), {})
        while workers.busy():
            list(workers.events(1.0))
        workers.workers[0].process.kill()
        workers.workers[0].process.join()
        workers.submit((spec(epochs=1, seed=1),), {})
        kinds = []
        while workers.busy():
            kinds += [event.kind for event in workers.events(1.0)]
    assert kinds[-2:] == ["record", "finished"] and "died" not in kinds
    assert len(Store(tmp_path).load()[0]) == 2


def test_a_worker_killed_while_it_starts_is_replaced_a_few_times(tmp_path: Path) -> None:
    workers = Unstarted(tmp_path, *[-signal.SIGKILL] * (MAX_LOST_STARTS + 1))
    events = [workers.next_event() for _ in range(MAX_LOST_STARTS + 1)]
    assert [event.kind for event in events] == [*["lost"] * MAX_LOST_STARTS, "broken"]
    assert events[0].content == "signal 9" and events[0].fleet == (spec(),)
    assert "too little memory" in str(events[-1].content) and "__main__" not in str(events[-1].content)


def test_a_worker_that_ends_by_itself_while_it_starts_breaks_the_sweep(tmp_path: Path) -> None:
    event = Unstarted(tmp_path, 1).next_event()
    assert event.kind == "broken" and "could not start (exit code 1)" in str(event.content)


def test_a_worker_killed_in_the_middle_of_a_message(tmp_path: Path) -> None:
    """Its length says 100 bytes, and only three came."""
    workers = Unstarted(tmp_path, -signal.SIGKILL, 0, said=(100).to_bytes(4, "big") + b"abc")
    workers.workers[0].started = True
    event = workers.next_event()
    assert (event.kind, event.content) == ("died", "signal 9") and workers.idle() == 1


@pytest.mark.parametrize("change", ["edited", "half-way", "gone"])
def test_changed_code_is_noticed(tmp_path: Path, change: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MIXER)
    fleet = (spec(f"{file}@Mine"),)
    sent = pack(fleet)
    assert unpack(sent, "") == list(fleet)
    if change == "gone":
        file.unlink()
    else:
        file.write_text(MIXER.replace("flip(1)", "flip(1) * 2" if change == "edited" else "flip("))
    catalog.source_hash.cache_clear()  # a worker is another process
    with pytest.raises(LaunchError, match=r"^Other code of .*mine.py@Mine or mqar"):
        unpack(sent, "Other code of {code}")


def test_a_mixer_that_is_edited_while_the_sweep_runs_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MIXER)
    fleet = (spec(f"{file}@Mine", epochs=1),)
    pack(fleet)  # the driver has looked at it
    file.write_text(MIXER.replace("flip(1)", "flip(1) * 2"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with LocalWorkers(["cpu"], tmp_path / "store") as workers:
        workers.submit(fleet, {})
        events: list[Event] = []
        while workers.busy():
            events += workers.events(1.0)
    assert [event.kind for event in events] == ["broken", "finished"]
    assert "was changed while the sweep ran; start it again." in str(events[0].content)
    assert not (tmp_path / "store").exists()
