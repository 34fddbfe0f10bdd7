"""Claims: one holder at a time, void soon after a death, taken over by one alone, and lost by a process that slept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench import claims
from bench.claims import Claims, holder, this_process
from bench.store import Store, StoreError
from tests.launch.sweeps import environment, wait_for

RUN = "0123456789ab"
HOLDS = """
import sys, time
from pathlib import Path
from bench.claims import Claims
from bench.store import Store

with Claims(Store(Path(sys.argv[1]))) as held:
    print(held.take(sys.argv[2]), flush=True)
    time.sleep(60)
"""


def files(store: Store) -> list[str]:
    return sorted(path.name for path in store.path(RUN).iterdir())


def foreign(store: Store, age: float, number: int = 1) -> None:
    """A claim of a process of which nothing is known here, last touched some seconds ago."""
    path = store.path(RUN) / f"claim.{number}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(this_process().model_copy(update={"machine": "another"}).model_dump_json())
    os.utime(path, (time.time() - age,) * 2)


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with Claims(store) as one, Claims(store) as other:
        assert one.take(RUN) and one.holds(RUN)
        assert not other.take(RUN) and not other.holds(RUN)
        assert holder(store, RUN) == this_process()
        one.free(RUN)
        assert holder(store, RUN) is None
        assert other.take(RUN)
        assert files(store) == ["claim.2"]
        other.drop(RUN)
        assert files(store) == []


def test_leaving_frees_what_is_held(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with Claims(store) as one:
        one.take(RUN)
    assert holder(store, RUN) is None and files(store) == ["claim.1"]


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    command = [sys.executable, "-c", HOLDS, str(tmp_path), RUN]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(tmp_path)) as process,
        Claims(store) as claims_,
    ):
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        assert not claims_.take(RUN)
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: claims_.take(RUN), 5.0)  # before the dead process is collected


@pytest.mark.parametrize(("age", "free"), [(claims.EXPIRY_SECONDS - 60, False), (claims.EXPIRY_SECONDS + 5, True)])
def test_a_silent_host_loses_its_claim(tmp_path: Path, age: float, free: bool) -> None:
    store = Store(tmp_path)
    foreign(store, age)
    assert (holder(store, RUN) is None) == free
    with Claims(store) as one:
        assert one.take(RUN) == free
        assert files(store) == (["claim.2"] if free else ["claim.1"])


def test_a_claim_that_is_being_written_is_held(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.path(RUN).mkdir()
    (store.path(RUN) / "claim.1").touch()
    with Claims(store) as one:
        assert not one.take(RUN)


def test_one_alone_takes_over(tmp_path: Path) -> None:
    """Eight at once, each time on a claim that has just expired."""
    store = Store(tmp_path)
    for number in range(1, 16):
        foreign(store, 1e6, number)
        barrier, won = threading.Barrier(8), []
        everyone = [Claims(store) for _ in range(8)]

        def race(one: Claims, barrier: threading.Barrier = barrier, won: list[Claims] = won) -> None:
            barrier.wait()
            if one.take(RUN):
                won.append(one)

        threads = [threading.Thread(target=race, args=(one,)) for one in everyone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].drop(RUN)
        foreign(store, 1e6, number)


def test_beating_keeps_a_claim_and_being_superseded_loses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(claims, "EXPIRY_SECONDS", 1.0)
    store = Store(tmp_path)
    with Claims(store) as one:
        one.take(RUN)
        time.sleep(1.5)
        assert one.holds(RUN) and not one.lost() and holder(store, RUN) is not None
        foreign(store, 0.0, number=2)  # as if this process had slept, and another host had taken over
        wait_for(one.lost, 3.0)
        assert not one.holds(RUN)
    assert holder(store, RUN) is not None  # leaving frees nothing of the other's


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        Claims(Store(tmp_path / "file")) as one,
        pytest.raises(StoreError, match=r"could not be written.*the same command goes on"),
    ):
        one.take(RUN)


FULL = """
import resource, signal, sys
from pathlib import Path
from bench.claims import Claims
from bench.store import Store, StoreError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Claims(Store(Path(sys.argv[1]))) as held:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        held.take(sys.argv[2])
    except StoreError:
        sys.exit(7)
"""


def test_a_claim_that_a_full_disk_left_holds_nothing(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", FULL, tmp_path, RUN], env=environment(tmp_path), check=False).returncode == 7
    with Claims(Store(tmp_path)) as held:
        assert held.take(RUN)
