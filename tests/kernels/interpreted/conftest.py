"""These files are collected only where Triton's interpreter is on; see tests/kernels/test_interpreted.py."""

import os

import pytest
import torch

from kernels.dispatch import use_backend

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]


@pytest.fixture(autouse=True)
def _poisoned_triton(monkeypatch):
    """Forces the Triton form and fills every buffer that kernels allocate with NaN, so that a missed write shows."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    with use_backend("triton"):
        yield
