"""Fleets are one graph: what a family's forward pass calls is known to the tracer of the torch that is installed here.

Dynamo alone is asked, and its graph is run as it is: what it cannot trace would end compiled training of the family.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.build import build_task
from bench.data import Picked
from bench.dropout import example_keys
from bench.recipes.readme_plot import FOR_EACH_WIDTH
from bench.stacked import StackedModel
from tests.benchmarks.fleet_speed import specs

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
MIXERS = ("attention", "sliding_window:window=9", "based:feature_dim=16", *FOR_EACH_WIDTH)
WIDTH, BATCH, LENGTH, ROWS = 256, 2, 64, 4


@pytest.mark.parametrize("members", [4, 1])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_fleet_is_traced_whole(mixer: str, members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    fleet = specs(mixer, WIDTH, members)
    model = StackedModel(fleet, build_task(fleet[0].task), CUDA, "bf16", compiled=True)
    numbers = torch.zeros(members, BATCH, ROWS, dtype=torch.int64, device=CUDA)
    batch = Picked(torch.ones(members, BATCH, LENGTH, dtype=torch.int32, device=CUDA), numbers, numbers, None)
    seeds = torch.arange(members, dtype=torch.int32, device=CUDA)
    keys = example_keys(seeds, seeds[0], BATCH) if model.module.embed_dropout else None
    loss_E, _ = model.loss_and_score(batch, keys, torch.ones(members, device=CUDA))
    assert loss_E.shape == (members,) and loss_E.requires_grad and bool(loss_E.isfinite().all())
