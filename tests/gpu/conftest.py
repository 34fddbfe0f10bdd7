"""A CUDA context for autograd's own thread: torch warns if a backward pass is the first to need one there."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.convert.conftest import tokenizer  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def _context_of_backward() -> None:
    if torch.cuda.is_available():
        x = torch.ones(2, 2, device="cuda", requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.autograd.grad((x @ x).sum(), x)
