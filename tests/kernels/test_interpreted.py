"""Runs the files `interpreted_*.py` under Triton's interpreter, which must be switched on before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NUMPY = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
"""The interpreter of Triton 3.6 turns arrays into loop bounds, of which NumPy 2.3 warns and which NumPy 2.4 refuses."""
FILES = sorted(HERE.glob("interpreted_*.py"))


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", NUMPY, str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
