"""Every test runs offline, on one thread, and leaves torch's global random state alone."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from kernels.values import checked_values

torch.set_num_threads(1)

CHECKED = {"kernels", "gpu", "contract"}
"""Folders whose tests let kernels look at the values of their arguments."""


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _checked(request: pytest.FixtureRequest) -> Iterator[None]:
    with checked_values(request.path.parent.name in CHECKED):
        yield
