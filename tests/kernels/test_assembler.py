"""Which assembler is taken: programs that answer like one of a version stand in for those that are not installed."""

import os
import stat
from pathlib import Path

import pytest
import torch

from kernels import assembler, dispatch


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Hopper machine without a toolkit, on which `make(name, version)` installs an assembler and returns its path."""

    def make(name: str, version: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(assembler, "_generation", lambda _: 9)
    monkeypatch.setattr(assembler, "_bundled", lambda: (12, 8))
    monkeypatch.setattr(assembler, "_installed", lambda: iter(sorted(tmp_path.glob("toolkit*"))))
    monkeypatch.delenv(assembler.VARIABLE, raising=False)
    assembler._choose.cache_clear()
    yield make
    assembler._choose.cache_clear()


def test_an_old_one_alone_is_an_obstacle(machine):
    assert "inside of Triton is of CUDA 12.8, and before 13.3" in assembler.tensor_core_obstacle()
    assert assembler.VARIABLE not in os.environ


def test_a_newer_one_that_is_installed_is_taken(machine, monkeypatch: pytest.MonkeyPatch):
    machine("toolkit-a", "13.0")
    newer = machine("toolkit-b", "13.5")
    monkeypatch.setenv(assembler.VARIABLE, "")  # so that the fixture's end restores it
    assert assembler.tensor_core_obstacle() is None
    assert os.environ[assembler.VARIABLE] == str(newer)


@pytest.mark.parametrize(("version", "safe"), [("13.3", True), ("14.0", True), ("13.2", False), ("12.9", False)])
def test_the_users_choice_is_kept_and_judged(machine, monkeypatch: pytest.MonkeyPatch, version: str, safe: bool):
    machine("toolkit", "13.5")
    chosen = str(machine("mine", version))
    monkeypatch.setenv(assembler.VARIABLE, chosen)
    found = assembler.tensor_core_obstacle()
    assert (found is None) is safe
    assert safe or chosen in found
    assert os.environ[assembler.VARIABLE] == chosen


def test_one_that_does_not_run_is_an_obstacle(machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(assembler.VARIABLE, "/nowhere/ptxas")
    assert "/nowhere/ptxas cannot be run" in assembler.tensor_core_obstacle()


def test_other_devices_do_not_ask(machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assembler, "_generation", lambda _: 8)
    assert assembler.tensor_core_obstacle() is None


def test_the_bundled_one_answers():
    version = assembler._bundled()
    assert version is not None
    assert version >= (12, 0)


def test_only_products_are_kept_from_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "tensor_core_obstacle", lambda: "the assembler is too old")
    monkeypatch.setattr(dispatch, "_say_once", lambda *_, **__: None)

    class OnCuda:
        """Enough of a CUDA tensor for the choice."""

        is_cuda, dtype = True, torch.bfloat16

    assert dispatch.pick("x", OnCuda(), tensor_cores=True) == "chunked"
    assert dispatch.pick("x", OnCuda()) == "triton"
