"""The frame around the mixers."""

from __future__ import annotations

import math

import pytest
import torch

from bench.build import build_model, build_task
from bench.spec import TaskSpec
from tests.unit.small_runs import CELLS, CPU, spec


def test_zoology_frame_has_its_quirks() -> None:
    task = build_task(TaskSpec(name="mqar", options=CELLS))
    model = build_model(spec("attention*2", model={"n_layers": 4}), task, CPU)
    x_BTD = torch.randn(2, 5, 16)
    r_BTD = x_BTD
    for block in model.blocks:
        mixed = r_BTD + block.mixer(block.norm1(r_BTD))[0]
        r_BTD = mixed + block.norm2(mixed)
    torch.testing.assert_close(model.hidden(x_BTD), r_BTD)
    out = torch.cat([block.mixer.out_proj.weight.flatten() for block in model.blocks])
    assert float(out.detach().std()) == pytest.approx(0.02 / math.sqrt(8), rel=0.1)
    mamba, r_BTD = build_model(spec("mamba2*2"), task, CPU), x_BTD
    for block in mamba.blocks:
        r_BTD = r_BTD + block.mixer(block.norm1(r_BTD))[0]
    torch.testing.assert_close(mamba.hidden(x_BTD), r_BTD)


def test_layers_are_cycled() -> None:
    task = build_task(TaskSpec(name="mqar", options=CELLS))
    model = build_model(spec("gla*3+attention", model={"n_layers": 8}), task, CPU)
    assert [mixer.name for mixer in model.mixers()] == ["gla", "gla", "gla", "attention"] * 2
