"""Training on a device that is not the first: its graphs are captured there, one after the other for two devices of a process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.runner import execute
from bench.store import Store
from tests.unit.small_runs import spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_runs_on_each_device_are_stored(tmp_path: Path) -> None:
    for index in (0, 1):
        store = Store(tmp_path / str(index))
        assert execute([spec("gla"), spec("gla", seed=1)], torch.device("cuda", index), store)
        records = store.load()[0]
        assert len(records) == 2
        assert all(record.metric("test", "accuracy") is not None for record in records)
