"""The walks for Hopper, followed on the CPU, against the token loop in fp64: outputs, states, gradients."""

import pytest
import torch
from torch.func import grad, vmap

from kernels.delta_rule import delta_hopper, delta_hopper_reach
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.reference import linear_recurrence_reference
from kernels.walks import (
    walk_grouped,
    walk_hopper,
    walk_hopper_back,
    walk_hopper_launch,
    walk_hopper_parts,
    walk_hopper_plan,
    walk_hopper_shared,
    walk_hopper_shared_launch,
    walk_hopper_states,
    walk_hopper_states_launch,
)
from tests.kernels.gluon_memory import Descriptor
from tests.kernels.gluon_on_cpu import OnCpu
from tests.kernels.interpreted_linear_recurrence import call, draw, run
from tests.kernels.oracle import SINGLE, poisoned, rms_error

C = walk_hopper_plan.CHUNK
MODULES = (
    delta_hopper, delta_hopper_reach, walk_hopper_parts, walk_hopper, walk_hopper_back, walk_hopper_states, walk_hopper_shared,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    kernels = [(walk_hopper, "forward_kernel"), (walk_hopper_back, "backward_kernel"), (walk_hopper_states, "states_kernel")]
    kernels += [(walk_hopper_shared, name) for name in ("queries_kernel", "keys_kernel")]
    for module, name in kernels:
        monkeypatch.setattr(module, name, OnCpu(getattr(module, name), MODULES))
    for launch in (walk_hopper_launch, walk_hopper_states_launch, walk_hopper_shared_launch):
        monkeypatch.setattr(launch, "_described", Descriptor)
        monkeypatch.setattr(
            launch, "line_rows", lambda x, rows, spare: Descriptor(x.view(rows, -1), [1, C]) if x.numel() else spare
        )
    monkeypatch.setattr(walk_hopper_plan, "suits", lambda inputs: inputs.k.shape[2] == inputs.v.shape[2])
    monkeypatch.setattr(walk_hopper_plan, "suits_shared", lambda _: True)
    with use_backend("triton"), poisoned():
        yield


def check(shape, gate):
    exact = draw(shape, gate, state=True)
    single = {name: x.detach().float().requires_grad_() for name, x in exact.items()}
    names = ("o", "final", *exact)
    for name, a, b in zip(names, run(linear_recurrence, single), run(linear_recurrence_reference, exact), strict=True):
        assert rms_error(a, b) <= (1e-3 if name == "log_decay" else 5 * SINGLE), (shape, name, rms_error(a, b))


# batch, length, groups, heads, key width, value width
@pytest.mark.parametrize("gate", ["none", "constant", "scalar", "strong", "zero"])
@pytest.mark.parametrize("shape", [(1, 130, 2, 2, 20, 33), (2, 70, 1, 1, 72, 96)], ids=str)
def test_equals_the_token_loop(shape, gate):
    check(shape, gate)


@pytest.mark.parametrize("gate", ["none", "scalar", "rare"])
def test_segments_of_long_rows(monkeypatch, gate):
    """Three segments, the last of which is short."""
    monkeypatch.setattr(walk_hopper_plan, "LEAST_SEGMENT", 64)
    check((1, 300, 2, 2, 20, 33), gate)


@pytest.mark.parametrize("gate", ["constant", "scalar", "strong", "zero"])
def test_segments_whose_beginning_is_forgotten(monkeypatch, gate):
    """Under decays one or two of a segment's four chunks reach its end."""
    monkeypatch.setattr(walk_hopper_plan, "LEAST_SEGMENT", 256)
    check((1, 64 * 11 + 20, 1, 1, 20, 33), gate)


@pytest.mark.parametrize("gate", ["none", "constant", "scalar"])
@pytest.mark.parametrize(("shape", "programs"), [((2, 130, 1, 4, 72, 24), 256), ((1, 300, 2, 8, 16, 24), 1)], ids=str)
def test_heads_that_share_keys(monkeypatch, gate, shape, programs):
    """Their states are kept, and gradients are made chunk by chunk: of one head a program, or of all four of a group."""
    monkeypatch.setattr(walk_grouped, "PROGRAMS", programs)
    monkeypatch.setattr(walk_hopper_plan, "LEAST_SEGMENT", 128)
    monkeypatch.setattr(walk_grouped, "_dot_dtype", lambda *_: torch.float16)
    check(shape, gate)


@pytest.mark.parametrize("shape", [(1, 130, 2, 2, 20, 33), (2, 70, 1, 4, 72, 24)], ids=str)
def test_gradients_of_members(monkeypatch, shape):
    """What is kept between the passes goes through vmap with the batch, here inside of which gradients are taken."""
    monkeypatch.setattr(walk_grouped, "_dot_dtype", lambda *_: torch.float16)
    members = [{name: x.detach().float() for name, x in draw(shape, "scalar", state=True).items()} for _ in range(2)]
    names = list(members[0])

    def loss(*values):
        return call(linear_recurrence, dict(zip(names, values, strict=True)))[0].square().sum()

    gradient = grad(loss, tuple(range(len(names))))
    mapped = vmap(gradient)(*(torch.stack([member[name] for member in members]) for name in names))
    for index, member in enumerate(members):
        for a, b in zip(mapped, gradient(*member.values()), strict=True):
            torch.testing.assert_close(a[index], b, rtol=1e-4, atol=1e-5)


def test_rows_that_copies_cannot_take():
    """A transposed projection is copied first."""
    exact = draw((1, 40, 2, 2, 16, 24), "none", state=True)
    single = {name: x.detach().float().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for name, x in exact.items()}
    assert rms_error(call(linear_recurrence, single)[0], call(linear_recurrence_reference, exact)[0]) <= SINGLE
