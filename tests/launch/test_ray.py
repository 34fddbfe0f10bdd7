"""A Ray cluster of three nodes on this machine: fleets are spread, and survive the loss of a node and of a worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.errors import UserError
from bench.launch.on_ray import RayOptions, connect
from bench.launch.remote import choose_device
from tests.launch.sweeps import checkpoints, complete, environment, finish, heard, start, wait_for

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores, and two nodes that may be killed, with one core each."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the names of Ray's sockets must be short
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    small = {"object_store_memory": 10**8, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    found.nodes_to_kill = [found.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
    yield found
    found.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_killed_node(cluster: Any, tmp_path: Path) -> None:
    """Its fleet goes on elsewhere from its last checkpoint; nothing is lost or trained twice."""
    where = f"--launch=ray:address={cluster.address}"
    driver = start(tmp_path, where, "--seeds=3", "--fleet=1", "--jobs=2", "--set=train.epochs=200", "--json")
    wait_for(lambda: len(checkpoints(tmp_path)) == 2)
    cluster.remove_node(cluster.nodes_to_kill[0], allow_graceful=False)
    code, out, err = finish(driver)
    assert code == 0, out + err
    assert {json.loads(line)["kind"] for line in out.splitlines()} == {"run"}  # what Ray prints goes elsewhere
    assert "Device: Ray cluster of 3 hosts, 2 CPU cores" in err
    assert "the run goes on from its last checkpoint" in err
    assert len(complete(tmp_path)) == 3 and heard(tmp_path, "resumed") == [1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_a_killed_process(cluster: Any, tmp_path: Path, victim: str) -> None:
    where = f"--launch=ray:address={cluster.address}"
    driver = start(tmp_path, where, "--seeds=2", "--fleet=1", "--jobs=2", "--set=train.epochs=300")
    wait_for(lambda: len(checkpoints(tmp_path)) == 2)
    if victim == "worker":
        claim = next(tmp_path.glob("results/runs/*/claim.1"))
        os.kill(json.loads(claim.read_text())["pid"], signal.SIGKILL)
        resumed = [1]
    else:
        driver.kill()
        finish(driver)
        driver, resumed = start(tmp_path, where, "--seeds=2", "--fleet=1", "--jobs=2", "--set=train.epochs=300"), [1, 1]
    code, out, err = finish(driver)
    assert code == 0, out + err
    assert len(complete(tmp_path)) == 2 and heard(tmp_path, "resumed") == resumed


@pytest.mark.slow
def test_ctrl_c_leaves_checkpoints(cluster: Any, tmp_path: Path) -> None:
    arguments = [f"--launch=ray:address={cluster.address}", "--seeds=2", "--fleet=1", "--jobs=2", "--set=train.epochs=300"]
    driver = start(tmp_path, *arguments)
    wait_for(lambda: len(checkpoints(tmp_path)) == 2)
    before = [path.stat().st_mtime_ns for path in checkpoints(tmp_path)]
    driver.send_signal(signal.SIGINT)
    code, out, err = finish(driver)
    assert code == 130, out + err
    assert all(new.stat().st_mtime_ns > old for new, old in zip(checkpoints(tmp_path), before, strict=True))
    code, out, err = finish(start(tmp_path, *arguments))
    assert code == 0, out + err
    assert len(complete(tmp_path)) == 2 and heard(tmp_path, "resumed") == [1, 1]


def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/no_ray_cluster_has_its_files_here")
    with pytest.raises(UserError, match="no Ray cluster at auto"):
        connect(RayOptions().address)


@pytest.mark.parametrize("address", ["no-such-host.invalid:6379", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_head_that_does_not_answer(address: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster at {address}"):
        connect(address)
    assert time.monotonic() - began < 60  # Ray itself would go on for many minutes


@pytest.mark.parametrize(
    ("device", "gpus", "present", "found"),
    [
        ("auto", None, 0, ("cpu", 0)),
        ("auto", None, 8, ("cuda", 1)),
        ("auto", 0.25, 0, ("cuda", 0.25)),
        ("cpu", None, 8, ("cpu", 0)),
        ("cuda", None, 0, ("cuda", 1)),
    ],
)
def test_devices_of_a_cluster(device: str, gpus: float | None, present: int, found: tuple[str, float]) -> None:
    assert choose_device("ray", device, gpus, present) == found


@pytest.mark.parametrize(("device", "gpus", "words"), [("cpu", 0.5, "exclude"), ("cuda", 0.0, "exclude"), ("cuda:1", None, "auto")])
def test_devices_that_make_no_sense(device: str, gpus: float | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose_device("ray", device, gpus, 0)
