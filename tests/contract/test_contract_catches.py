"""The contract catches faults: a sound toy mixer passes every check, and each broken copy fails the checks listed."""

from functools import partial

import pytest

from mixers import REGISTRY, Mixer
from mixers._contract import CHECKS, bounded_state, check_contract
from tests.contract.faulty_mixers import FAULTS, LooksAhead, Sound


def failures(monkeypatch: pytest.MonkeyPatch, cls: type[Mixer]) -> dict[str, str]:
    monkeypatch.setitem(REGISTRY, "toy", cls)
    return {result.name: result.detail for result in check_contract(partial(cls, 16)) if not result.passed}


def test_a_sound_mixer_passes(monkeypatch: pytest.MonkeyPatch):
    assert failures(monkeypatch, Sound) == {}
    assert bounded_state(Sound(16))


@pytest.mark.parametrize(("cls", "expected"), FAULTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_fails_its_check(monkeypatch: pytest.MonkeyPatch, cls: type[Mixer], expected: str):
    assert sorted(failures(monkeypatch, cls)) == sorted(expected.split())


def test_every_check_is_needed():
    assert {expected.split()[0] for expected in FAULTS.values()} == set(CHECKS)


def test_an_unregistered_mixer_fails_the_interface_check():
    (result,) = check_contract(partial(Sound, 16), names=["interface"])
    assert not result.passed
    assert "@mixer" in result.detail


def test_another_class_of_the_same_name_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(REGISTRY, "toy", type("Other", (Sound,), {}))
    (result,) = check_contract(partial(Sound, 16), names=["interface"])
    assert not result.passed
    assert "faulty_mixers.py" in result.detail and "both register the name 'toy'" in result.detail
    (result,) = check_contract(partial(LooksAhead, 16), names=["interface"])
    assert "LooksAhead is not registered" in result.detail  # its name is inherited


def test_an_exception_is_a_failed_result_with_its_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Sound, "step", lambda self, x, state: 1 / 0)
    (result,) = check_contract(partial(Sound, 16), names=["step"])
    assert not result.passed
    assert result.detail == "ZeroDivisionError: division by zero"


def test_a_factory_without_arguments_is_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(REGISTRY, "toy", Sound)
    assert all(result.passed for result in check_contract(lambda: Sound(16)))


def test_an_unknown_check_is_refused():
    with pytest.raises(ValueError, match="causality"):
        check_contract(partial(Sound, 16), names=["causal"])
