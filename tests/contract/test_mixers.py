"""The contract of every mixer in the zoo, in each of its variants: a new file in `mixers/` is tested the day it appears."""

import importlib
from functools import partial
from pathlib import Path

import pytest

import mixers
from mixers import LAYER_PATTERNS, REGISTRY, Mixer
from mixers._contract import CHECKS, bounded_state, check_contract

STEMS = sorted(path.stem for path in Path(mixers.__file__).parent.glob("[!_]*.py"))
for stem in STEMS:
    importlib.import_module(f"mixers.{stem}")
ZOO = [stem for stem in STEMS if stem not in LAYER_PATTERNS]


def label(options: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items()) or "default"


VARIANTS = [pytest.param(REGISTRY[name], o, id=f"{name}-{label(o)}") for name in ZOO for o in REGISTRY[name].variants]


@pytest.mark.parametrize("stem", STEMS)
def test_a_file_is_a_mixer_or_a_layer_pattern_of_its_name(stem: str):
    assert (stem in REGISTRY) != (stem in LAYER_PATTERNS)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_contract(cls: type[Mixer], options: dict, check: str):
    (result,) = check_contract(partial(cls, 16, **options), names=[check])
    assert result.passed, result.detail


@pytest.mark.parametrize("name", ZOO)
def test_defaults_work_at_width_16(name: str):
    made = REGISTRY[name](16)
    assert made.state_elements(64) > 0
    assert made.read_elements(64) <= made.state_elements(64)


@pytest.mark.parametrize("name", LAYER_PATTERNS)
def test_layer_pattern_names_mixers_and_their_options(name: str):
    for layer in LAYER_PATTERNS[name]():
        assert isinstance(REGISTRY[layer.mixer](16, **layer.options), Mixer)


def test_state_growth_is_measured():
    bounded = {name for name in ZOO if bounded_state(REGISTRY[name](16))}
    assert {"sliding_window", "base_conv", "h3"} <= bounded
    assert not {"attention", "hyena", "static_sparse", "block_topk"} & bounded
    assert bounded_state(REGISTRY["static_sparse"](16, mask="sink_window"))
