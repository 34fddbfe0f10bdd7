"""A layer's fused decoding step on a CUDA device: exact in every dtype, replayed by a graph, and used by mixers and decoders."""

from __future__ import annotations

import copy

import pytest
import torch

from bench import catalog
from kernels.dispatch import watched
from kernels.step import states_in_place
from kernels.steps import step_launch
from kernels.steps.step_launch import Config
from tests.gpu.compiled import require_nothing_new
from tests.kernels import cases_layer_step as cases
from tests.kernels.oracle import rms_error

pytestmark = pytest.mark.gpu

SHAPES = ((3, 4, 64, 64), (2, 16, 128, 128), (2, 3, 60, 100), (1, 2, 256, 256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(cases.FORMS))
def test_equals_the_definition(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        cases.check(name, shape, "cuda", dtype)


@pytest.mark.parametrize("name", list(cases.FORMS))
def test_heads_of_several_programs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for config in ("CONFIG", "WHOLE_HEAD"):
        monkeypatch.setattr(step_launch, config, Config(1024, 2))
    cases.check(name, (64, 16, 64, 64), "cuda", torch.bfloat16)


@pytest.mark.parametrize("name", ["gated_delta_net", "mamba2", "kda"])
def test_replayed_steps_are_a_sequence(name: str) -> None:
    """A captured step on states in place, replayed, goes on from where it was; the counters start anew each time."""
    form, tensors = cases.FORMS[name], cases.draw(name, (4, 4, 64, 64), device="cuda", dtype=torch.bfloat16)
    want = dict(tensors)
    for _ in range(4):
        done = cases.step(form, want)
        want |= {"state": done["state_BHKV"], "tail": done["tail_BPC"]}
    held = {key: tensors[key].clone() for key in ("state", "tail")}
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), states_in_place():
        cases.step(form, tensors)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            cases.step(form, tensors)
    for key, tensor in held.items():
        tensors[key].copy_(tensor)
    for _ in range(4):
        graph.replay()
    assert torch.equal(tensors["state"], want["state"])
    assert torch.equal(tensors["tail"], want["tail"])


@pytest.mark.parametrize(
    "name", ["delta_net", "gated_delta_net", "gla", "kda", "linear_attention", "mamba2", "normalized_gla", "retention", "supra"]
)
def test_mixers_decode_with_it(name: str) -> None:
    """Fused steps of a bf16 mixer follow its own recurrence in fp64."""
    kind = catalog.load("mixer", name)
    for options in kind.variants:
        if options.get("feature_map") == "taylor2":
            continue
        mixer = kind(64, **options).to("cuda", torch.bfloat16)
        exact = copy.deepcopy(mixer).double()
        x = torch.randn(3, 6, 64, device="cuda", dtype=torch.bfloat16)
        state = mixer.init_state(3, 8, device="cuda")
        true = exact.init_state(3, 8, device="cuda", dtype=torch.float64)
        fused, wanted = [], []
        with torch.no_grad():
            for token in x.unbind(1):
                with watched() as seen:
                    y, state = mixer.step(token, state)
                assert seen["layer_step"] == "triton"
                z, true = exact.step(token.double(), true)
                fused.append(y)
                wanted.append(z)
        assert rms_error(torch.stack(fused), torch.stack(wanted)) < 3e-2


def test_new_batches_and_heads_compile_nothing() -> None:
    from kernels.steps.step_triton import step_kernel

    def run(batch: int, heads: int) -> None:
        tensors = cases.draw("gated_delta_net", (batch, heads, 32, 32), device="cuda", dtype=torch.bfloat16)
        cases.step(cases.FORMS["gated_delta_net"], tensors)

    require_nothing_new((step_kernel,), run, (2, 2), (1, 1), (3, 5), (16, 16))
