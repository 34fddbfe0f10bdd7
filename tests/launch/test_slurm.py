"""Fleets as jobs of submitit's local executor, which runs what Slurm would run; the options that Slurm would get."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from bench.launch.place import Place, parse_place
from bench.launch.remote import Job
from tests.cli.conftest import Bench
from tests.launch.sweeps import checkpoints, complete, finish, heard, start, wait_for
from tests.unit.small_runs import spec

LOCAL = "--launch=slurm:cluster=local"


def test_a_killed_job(tmp_path: Path) -> None:
    """Its fleet is submitted again and goes on from its last checkpoint; nothing is lost or trained twice."""
    driver = start(tmp_path, LOCAL, "--seeds=2", "--fleet=1", "--jobs=2", "--set=train.epochs=200")
    wait_for(lambda: len(checkpoints(tmp_path)) == 2)
    claim = next(tmp_path.glob("results/runs/*/claim.1"))
    os.kill(json.loads(claim.read_text())["pid"], signal.SIGKILL)
    code, out, err = finish(driver)
    assert code == 0, out + err
    assert "the run goes on from its last checkpoint" in out
    assert len(complete(tmp_path)) == 2 and heard(tmp_path, "resumed") == [1]


@pytest.mark.slow
def test_a_killed_driver_leaves_its_jobs_at_work(tmp_path: Path) -> None:
    arguments = [LOCAL, "--seeds=2", "--fleet=1", "--jobs=2", "--set=train.epochs=300"]
    driver = start(tmp_path, *arguments)
    wait_for(lambda: len(checkpoints(tmp_path)) == 2)
    driver.kill()
    finish(driver)
    code, out, err = finish(start(tmp_path, *arguments))
    assert code == 0, out + err
    assert len(complete(tmp_path)) == 2 and heard(tmp_path, "resumed") == []


@pytest.mark.slow
def test_a_job_that_is_preempted_is_queued_again_by_submitit(tmp_path: Path) -> None:
    """The signal that Slurm sends before time runs out, or a job of higher priority starts."""
    driver = start(tmp_path, LOCAL, "--seeds=1", "--set=train.epochs=300")
    wait_for(lambda: checkpoints(tmp_path))
    (claim,) = tmp_path.glob("results/runs/*/claim.1")
    os.kill(json.loads(claim.read_text())["pid"], signal.SIGUSR2)
    code, out, err = finish(driver)
    assert code == 0 and "A worker ended" not in out, out + err
    assert len(complete(tmp_path)) == 1 and heard(tmp_path, "resumed") == [1]


def test_a_job_without_the_store_or_with_other_code_stops_the_sweep(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.json"
    job = Job({}, {}, "cpu", 1, str(tmp_path / "absent"), str(sweep))
    assert "does not see the store" in job().fault
    sweep.touch()
    text = spec().model_dump_json()
    job = Job({"0123456789ab": text}, {}, "cpu", 1, str(tmp_path), str(sweep))
    assert "other code of attention or mqar" in job().fault
    sweep.unlink()
    assert job().fault == ""  # the driver was told to stop: nothing is trained
    assert list(tmp_path.iterdir()) == []


def test_options_reach_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name takes the job and keeps what it was given."""
    (tmp_path / "srun").touch(0o755)
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\ncp $1 {tmp_path}/given\necho Submitted batch job 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    place = parse_place("slurm:partition=gpu,time=90,cpus=4,mem=12,account=me,constraint=h100")
    assert place.device("cuda").kind == "cuda"
    workers = place.workers("cuda", 3, 10, tmp_path / "store", tmp_path / "sweep.json")
    assert workers.idle() == 3
    workers.submit((spec(), spec(seed=1)), {})
    assert (workers.idle(), workers.busy()) == (2, {spec(), spec(seed=1)})
    options = {line.split(" ", 1)[1] for line in (tmp_path / "given").read_text().splitlines() if line.startswith("#SBATCH")}
    assert options >= {
        "--partition=gpu",
        "--time=90",
        "--cpus-per-task=4",
        "--mem=12GB",
        "--account=me",
        "--constraint=h100",
        "--gpus-per-node=1",
    }
    assert list((tmp_path / "store/.submitit").glob("7_submitted.pkl"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slumr", ["'slumr'", "Did you mean 'slurm'"]),
        ("local:gpus=1", ["'gpus'"]),
        ("ray:gpu=1", ["'gpu'", "Did you mean 'gpus'"]),
        ("ray:gpus=2", ["'2'", "less than or equal to 1"]),
        ("ray:gpus", ["no value", "ray:gpus=VALUE"]),
        ("slurm:time=soon", ["'soon'", "integer"]),
        ("slurm:cluster=local,partitio=gpu", ["'partitio'", "Did you mean 'partition'"]),
        ("slurm:cluster=local,gpus=1", ["exclude each other"]),
    ],
)
def test_bad_places(bench: Bench, text: str, words: list[str]) -> None:
    outcome = bench.tiny(f"--launch={text}")
    assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert all(word in outcome.err for word in words), outcome.err
    assert bench.files() == set()


def test_slurm_without_slurm(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    outcome = bench.tiny("--launch=slurm:partition=gpu")
    assert outcome.code == 2 and "there is no srun" in outcome.err and "slurm:cluster=local" in outcome.err


def test_the_default_is_this_machine() -> None:
    assert parse_place("local").device("cpu").kind == "cpu"
    assert isinstance(parse_place("local"), Place)
