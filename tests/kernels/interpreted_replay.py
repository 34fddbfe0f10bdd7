"""Calls that are repeated from notes give what the calls themselves give, with the recurrences' own kernels in the interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

from kernels import _replay
from kernels.dispatch import use_backend
from kernels.dplr import dplr_recurrence
from kernels.recurrence import linear_recurrence
from tests.kernels.oracle import poisoned

B, T, H, K, V = 1, 5, 2, 20, 16


class Compiled:
    """A kernel that is launched with addresses, as compiled ones are."""

    function = packed_metadata = None

    def __init__(self, launch: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.launch, self.dtypes = launch, [x.dtype if isinstance(x, Tensor) else None for x in args]

    def run(self, x: int, y: int, z: int, *args: Any) -> None:
        """See `triton.compiler.CompiledKernel`."""
        given = args[6 : 6 + len(self.dtypes)]
        self.launch(
            *(at if dtype is None else tensor_at(at, dtype) for at, dtype in zip(given, self.dtypes, strict=True)), grid=(x, y, z)
        )


def tensor_at(address: int, dtype: torch.dtype) -> Tensor:
    """One element there, which is all that a pointer says."""
    if not address:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_ubyte * dtype.itemsize).from_address(address))).view(dtype)


@pytest.fixture
def repeating(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls on a CPU are repeated, and launches noted."""
    real = InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        def launch(*args: Any, grid: Any) -> None:
            real(self, *args, grid=grid, warmup=warmup, **constants)

        launch(*args, grid=grid)
        if (watch := _replay.watch()) is not None:
            knobs.runtime.launch_enter_hook(None)
            watch.launch(Compiled(launch, args), grid, [*args, *(constants[name] for name in self.arg_names[len(args) :])])

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(_replay, "FIRST_DEVICE", -1)
    monkeypatch.setattr(_replay, "current_device", lambda: -1)
    monkeypatch.setattr(_replay, "current_stream", lambda _: 0)
    with _replay.forgetful(), use_backend("triton"):
        yield


def drawn(gate: str, delta: bool, state: bool) -> dict[str, Tensor]:
    """Fresh tensors, at addresses of their own."""
    found = {name: torch.randn(B, T, H, width) for name, width in (("q_BTGK", K), ("k_BTGK", K), ("v_BTHV", V))}
    found["k_BTGK"] = normalize(found["k_BTGK"], dim=-1)
    sizes = {"none": None, "constant": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}[gate]
    if sizes is not None:
        found["log_decay"] = -torch.rand(sizes)
    if delta:
        found["beta_BTH"] = torch.rand(B, T, H)
    if state:
        found["state_BHKV"] = torch.randn(B, H, K, V)
    return {name: x.requires_grad_() for name, x in found.items()}


def outcome(fn: Callable[..., Any], tensors: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    found = [x for x in fn(**tensors) if x is not None]
    return [*found, *torch.autograd.grad(sum((x * x.detach().sin()).sum() for x in found), list(tensors.values()))]


def check(fn: Callable[..., Any], draw: Callable[[], dict[str, Tensor]]) -> None:
    """Later calls, with memory that holds no numbers, against what nothing is known of."""
    held = [draw() for _ in range(3)]
    for tensors in held[:2]:
        outcome(fn, tensors)
    with poisoned():
        got = [outcome(fn, tensors) for tensors in held[1:]]
    plans = [plan for repeated in _replay.functions() for plan in repeated.plans.values()]
    assert plans
    assert all(isinstance(plan, _replay.Plan) for plan in plans)
    for tensors, found in zip(held[1:], got, strict=True):
        _replay.forget()
        torch.testing.assert_close(found, outcome(fn, tensors), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("gate", "delta", "state"),
    [("scalar", False, True), ("none", True, False), ("constant", True, True), ("vector", False, False), ("vector", True, True)],
)
def test_recurrences(gate: str, delta: bool, state: bool, repeating: None) -> None:
    check(linear_recurrence, lambda: drawn(gate, delta, state))


def test_diagonal_plus_rank_one(repeating: None) -> None:
    def draw() -> dict[str, Tensor]:
        found = {name.replace("BTG", "BTH"): x for name, x in drawn("none", False, True).items()}
        a, b, gate = (torch.randn(B, T, H, K) for _ in range(3))
        more = {"a_BTHK": -0.5 * normalize(a, dim=-1), "b_BTHK": normalize(b, dim=-1), "log_decay_BTHK": -gate.abs()}
        return found | {name: x.requires_grad_() for name, x in more.items()}

    check(dplr_recurrence, draw)
