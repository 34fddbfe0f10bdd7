"""Faults of a sweep on one machine: two drivers, kills, a full disk, spoilt checkpoints, members that diverge."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.launch.local import LocalWorkers, worker_devices
from bench.store import Store
from tests.cli.conftest import Bench
from tests.launch.sweeps import checkpoints, complete, environment, finish, heard, start, wait_for


def test_two_drivers_share_a_sweep(tmp_path: Path) -> None:
    """Every run is trained once, and both drivers end with all records."""
    arguments = ["--seeds=4", "--fleet=1", "--set=train.epochs=20", "--json"]
    ends = [finish(driver) for driver in [start(tmp_path, *arguments) for _ in range(2)]]
    assert [code for code, _, _ in ends] == [0, 0], ends
    listed = [[json.loads(line)["run_id"] for line in out.splitlines()] for _, out, _ in ends]
    assert len(set(listed[0])) == 4 and listed[0] == listed[1]
    assert len(complete(tmp_path)) == 4
    assert not (tmp_path / "results/runs/.sweeps").exists()


@pytest.mark.slow
def test_a_killed_driver_is_shown_and_its_runs_go_on(tmp_path: Path, bench: Bench) -> None:
    arguments = ["--seeds=2", "--set=train.epochs=300"]
    driver = start(tmp_path, *arguments)
    wait_for(lambda: len(checkpoints(tmp_path)) == 2 and len(list(tmp_path.glob("results/runs/*/progress.json"))) == 2)
    shown = bench("status", "--json")
    (sweep,), running = shown.lines("sweep"), shown.lines("running")
    assert sweep["alive"] and sweep["owner"]["pid"] == driver.pid and sweep["total"] == 2
    assert len(running) == 2 and all(0 < line["step"] <= line["steps"] == 600 for line in running)
    assert {line["host"] for line in running} == {sweep["owner"]["host"]}
    assert " of 600 steps, heard of " in bench("status").out
    driver.kill()
    finish(driver)
    wait_for(lambda: len(bench("status", "--json").lines("stopped")) == 2)
    shown = bench("status", "--json")
    assert not shown.lines("running")
    assert [line["alive"] for line in shown.lines("sweep")] == [False]
    code, out, err = finish(start(tmp_path, *arguments))
    assert code == 0, out + err
    assert heard(tmp_path, "resumed") == [1, 1] and len(complete(tmp_path)) == 2
    assert not bench("status", "--json").lines("sweep")


@pytest.mark.slow
def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    driver = start(tmp_path, "--seeds=1", "--set=train.epochs=300")
    wait_for(lambda: checkpoints(tmp_path))
    (claim,) = tmp_path.glob("results/runs/*/claim.1")
    os.kill(json.loads(claim.read_text())["pid"], signal.SIGKILL)
    code, out, err = finish(driver)
    assert code == 0 and out.count("A worker ended (signal 9)") == 1, out + err
    assert heard(tmp_path, "resumed") == [1] and len(complete(tmp_path)) == 1


def test_watching_ends_with_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "results/runs").mkdir(parents=True)
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from bench.cli import main; main()"
    command = [sys.executable, "-c", code, "status", "--watch"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment(tmp_path)) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
    assert [line.startswith("---") for line in lines] == [True, False, True, False]
    assert "holds no finished run" in lines[3]


def test_a_full_disk_stops_the_sweep_in_one_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    """The system lets no file grow beyond 4 KiB, so claims and progress can be written, and records cannot."""
    arguments = ["--seeds=2", "--fleet=1", "--set=train.epochs=1"]
    code, out, err = finish(start(tmp_path, *arguments, largest_file="4"))
    assert code == 1, out + err
    assert [line.startswith("bench: ") for line in err.strip().splitlines()] == [True], err
    assert "could not be written (File too large)" in err and "the same command goes on" in err
    assert not list(tmp_path.rglob("*.tmp"))
    code, out, err = finish(start(tmp_path, *arguments))
    assert code == 0, out + err
    assert len(complete(tmp_path)) == 2


@pytest.mark.slow
def test_a_spoilt_checkpoint_is_said_once(tmp_path: Path, bench: Bench) -> None:
    setting = ["--mixer=attention", "--seeds=1", "--set=train.lr=1e-3", "--no-report"]
    bench.tiny(*setting)
    store = Store(tmp_path / "results/runs")
    ((record,), _) = store.load()
    (store.path(record.run_id) / "record.json").unlink()
    (store.path(record.run_id) / "checkpoint.pt").write_bytes(b"PK spoilt")
    outcome = bench.tiny(*setting)
    assert outcome.code == 0
    assert outcome.out.count("Ignored") == 1 and "the run starts from the beginning" in outcome.out
    ((again,), _) = store.load()
    assert again.metrics == record.metrics


@pytest.mark.slow
def test_a_member_that_diverges_leaves_its_neighbours_alone(bench: Bench) -> None:
    rates = "--set=train.lr=1e-3,1e30"
    outcome = bench.tiny("--mixer=attention", "--seeds=1", rates, "--set=train.weight_decay=0", "--json", "--no-report")
    found = {(run["role"], run["spec"]["train"]["lr"]): run["status"] for run in outcome.lines("run")}
    assert found == {("select", 1e-3): "done", ("select", 1e30): "diverged", ("report", 1e-3): "done"}
    assert outcome.code == 1


RECIPE = """
from bench.spec import LayerSpec, ModelSpec, TaskSpec, TrainSpec
from bench.sweep import Experiment, Sweep

def misspelt():
    model = ModelSpec(layers=(LayerSpec(mixer="gla"),))
    return Sweep(experiments=(Experiment(task=TaskSpec(name="mqar"), model=model, train=TrainSpec(epoch=3), lrs=(1e-3,)),))

def empty():
    return Sweep(experiments=())

def something():
    return [1]
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("misspelt", ["'epoch' of TrainSpec is unknown", "Did you mean 'epochs'"]),
        ("empty", ["at least 1"]),
        ("something", ["list"]),
    ],
)
def test_a_recipe_that_is_no_sweep(bench: Bench, name: str, words: list[str]) -> None:
    Path("mine.py").write_text(RECIPE)
    outcome = bench("synthetic", f"--recipe=./mine.py@{name}")
    assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert all(word in outcome.err for word in words), outcome.err
    assert {file for file in bench.files() if "pycache" not in file} == {"mine.py"}


def test_one_worker_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert worker_devices("cuda", None) == ["cuda:0", "cuda:1", "cuda:2"]
    assert worker_devices("cuda", 5) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert worker_devices("cuda:1", None) == ["cuda:1"]
    assert len(worker_devices("cpu", None)) == len(os.sched_getaffinity(0))


def test_every_worker_trains_on_its_own_device(tmp_path: Path) -> None:
    """Two devices that are both the CPU stand for two GPUs."""
    from tests.unit.small_runs import spec

    found = []
    with LocalWorkers(["cpu:0", "cpu:1"], tmp_path) as workers:
        for seed in (0, 1):
            workers.submit((spec(seed=seed),), {})
        while workers.busy():
            found += [event.content for event in workers.events(1.0) if event.kind == "record"]
    assert {record.device for record in found} == {"cpu:0", "cpu:1"}
