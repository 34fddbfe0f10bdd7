"""The command that runs all GPU tests side by side reads what they say; on a CPU, with tests that need no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu import suite

TESTS = """
import time, pytest
pytestmark = pytest.mark.gpu

def test_right(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip
def test_left_out(): pass
def test_slow(): time.sleep(SECONDS)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(suite, "FOLDER", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    return tmp_path


def test_what_passed_failed_and_was_skipped(folder: Path) -> None:
    (folder / "test_some.py").write_text(TESTS.replace("SECONDS", "0"))
    (folder / "test_other.py").write_text("def test_without_the_marker(): assert False")
    found = suite.run(["test_some"], processes=1, seconds=60)
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)
    (row,) = found["files"]
    assert row["whole"] and row["failures"] == ["test_wrong"] and row["file"] == "tests/gpu/test_some.py"


def test_what_time_cut_off(folder: Path) -> None:
    (folder / "test_some.py").write_text(TESTS.replace("SECONDS", "600"))
    found = suite.run([], processes=1, seconds=20)
    assert (found["passed"], found["failed"], found["files"][0]["whole"]) == (1, 1, False)
    assert found["seconds"] < 60
