"""Decoding on the GPU: the recorded steps of both sides compute what the parallel pass computes."""

import pytest
import torch
from torch import nn

from bench.convert.student import build_student
from bench.judge.decoding import decoder
from bench.judge.speed import memory_and_speed
from bench.judge.suites import Size
from tests.convert.conftest import tiny
from tests.judge.test_measures import PLAN, check_decoder

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("kind", "plans"), [("KeyValueDecoder", None), ("Decoder", [PLAN, PLAN])], ids=["teacher", "student"])
def test_recorded_decoding_is_the_parallel_pass(kind: str, plans: list | None):
    model = tiny() if plans is None else build_student(tiny(), plans).eval()
    model = nn.Module.to(model, "cuda")
    tokens = torch.randint(0, 280, (41,), generator=torch.Generator().manual_seed(0)).cuda()
    check_decoder(model, tokens, kind, 1e-3)
    with torch.no_grad():
        cache = model(input_ids=tokens[None], use_cache=True).cache
    assert decoder(model, cache, 2, room=4).graph is not None


def test_speed_is_that_of_the_graph():
    size = Size(limit=1, lengths=(64,), windows=1, window_tokens=8, measured=(64,), batches=(1, 4))
    found = memory_and_speed(nn.Module.to(tiny(), "cuda"), size)
    speeds = {item.slice: item.value for item in found if item.name == "decode_tokens_per_second"}
    assert set(speeds) == {"batch 1, context 64, CUDA graph", "batch 4, context 64, CUDA graph"}
    assert speeds["batch 4, context 64, CUDA graph"] > speeds["batch 1, context 64, CUDA graph"] > 0  # type: ignore[operator]
