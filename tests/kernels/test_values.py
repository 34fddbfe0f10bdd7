"""The checked mode: what only values show is refused where it is on, and only there."""

from __future__ import annotations

import pytest
import torch

from kernels.cross_entropy import labelled_cross_entropy
from kernels.indexed_attention import decode_attention
from kernels.layer_step import Packed, layer_step
from kernels.recurrence import linear_recurrence
from kernels.scan import selective_scan
from kernels.step_form import StepForm
from kernels.values import check_values, checked_values
from mixers._contract import check_contract
from tests.kernels.test_bad_input import DOORS

NAN = [
    (door, name)
    for door in DOORS
    if door not in ("labelled_cross_entropy", "labelled_head", "distillation_rows")  # logits may be infinite
    for name, x in DOORS[door].tensors.items()
    if x.is_floating_point()
]


@pytest.mark.parametrize(("door", "argument"), NAN)
def test_what_is_not_finite_is_named(door: str, argument: str):
    tensors = dict(DOORS[door].tensors)
    for value in (float("nan"), float("inf")):
        broken = tensors[argument].clone()
        broken.view(-1)[-1] = value
        with pytest.raises(ValueError, match=r"values of \d+ that are not finite") as refused:
            DOORS[door].call(*(tensors | {argument: broken}).values())
        assert str(refused.value).startswith(argument)


def recurrence(**changed: torch.Tensor) -> object:
    x = torch.randn(1, 3, 2, 4)
    given = {"log_decay": -torch.rand(1, 3, 2), "beta_BTH": torch.rand(1, 3, 2)} | changed
    return linear_recurrence(x, x, x, **given)


def test_ranges():
    with pytest.raises(ValueError, match=r"log_decay has 6 values of 6 out of range, the first 0.5 at \[0, 0, 0\]; a log decay"):
        recurrence(log_decay=torch.full((1, 3, 2), 0.5))
    with pytest.raises(ValueError, match=r"beta has 1 values of 6 out of range, the first 2.25 at \[0, 1, 0\]"):
        beta = torch.ones(1, 3, 2)
        beta[0, 1, 0] = 2.25
        recurrence(beta_BTH=beta)
    x, rate, b = torch.ones(1, 3, 2), torch.ones(2, 4), torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match="a time step is at least 0"):
        selective_scan(x, -x, rate, b, b)
    with pytest.raises(ValueError, match="a decay rate is at least 0"):
        selective_scan(x, x, -rate, b, b)


def test_what_is_squashed_later_has_no_range():
    state, x = torch.zeros(1, 1, 2, 2), torch.ones(1, 6)
    layer_step(Packed(x, (0, 2, 4)), state, StepForm(open_beta=True), beta_BH=torch.full((1, 1), -3.0))
    with pytest.raises(ValueError, match="a write strength lies between 0 and 2"):
        layer_step(Packed(x, (0, 2, 4)), state, StepForm(), beta_BH=torch.full((1, 1), -3.0))


def test_labels_and_rows_that_see_nothing():
    with pytest.raises(ValueError, match=r"labels has 1 that are no class, the first 3 at \[1\]; they are 0 to 2 or -100"):
        labelled_cross_entropy(torch.randn(2, 3), torch.tensor([-100, 3]))
    q, kv = torch.randn(1, 2, 4), torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="seen has 2 rows that see nothing"):
        decode_attention(q, kv, kv, torch.zeros(1, 2, 3, dtype=torch.bool))


def test_nobody_looks_outside_of_the_mode():
    with checked_values(False):
        recurrence(log_decay=torch.full((1, 3, 2), float("nan")))


def test_values_of_members_are_looked_at_and_traced_ones_are_not():
    x, gates = torch.randn(1, 3, 2, 4), torch.zeros(5, 1, 3, 2)
    gates[3, 0, 2, 1] = 1.0
    with pytest.raises(ValueError, match=r"log_decay has 1 values of 30 out of range"):
        torch.vmap(lambda gate: linear_recurrence(x, x, x, log_decay=gate)[0])(gates)
    compiled = torch.compile(lambda gate: linear_recurrence(x, x, x, log_decay=gate)[0], backend="eager", fullgraph=True)
    compiled(gates[3])
    check_values("log_decay", gates[3].to("meta"))


def test_the_contract_catches_a_mixer_with_a_growing_gate():
    from mixers.retention import Retention

    def build() -> Retention:
        mixer = Retention(16)
        mixer.log_gamma.neg_()
        return mixer

    (result,) = check_contract(build, names=["split"])
    assert not result.passed
    assert "a state never grows" in result.detail
