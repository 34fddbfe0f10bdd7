"""A layer's fused decoding step in the interpreter; run by `test_interpreted.py` in a process of its own."""

import copy
from contextlib import nullcontext

import pytest
import torch

from bench import catalog
from kernels.dispatch import use_backend, watched
from kernels.step import states_in_place
from kernels.steps import step_launch
from kernels.steps.step_launch import Config
from tests.kernels import cases_layer_step as cases
from tests.kernels.oracle import SINGLE, poisoned, require_close

FUSED = ("delta_net", "gated_delta_net", "gla", "kda", "linear_attention", "mamba2", "normalized_gla", "retention", "supra")


@pytest.mark.parametrize("name", list(cases.FORMS))
def test_equals_the_definition(name: str):
    for shape in cases.SHAPES:
        cases.check(name, shape, "cpu", torch.float32)


@pytest.mark.parametrize("name", list(cases.FORMS))
def test_heads_of_several_programs(name: str, monkeypatch: pytest.MonkeyPatch):
    """The last program of a head norms it and moves the convolution's tail on."""
    for config in ("CONFIG", "WHOLE_HEAD"):
        monkeypatch.setattr(step_launch, config, Config(128, 1))
    cases.check(name, (2, 2, 16, 20), "cpu", torch.float32)


def test_groups_share_their_keys():
    cases.check("mamba2", (2, 4, 16, 8), "cpu", torch.float32, groups=2)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_taps(taps: int):
    cases.check("delta_net", (2, 2, 16, 8), "cpu", torch.float32, taps=taps)


@pytest.mark.parametrize("name", ["gated_delta_net", "mamba2"])
def test_members(name: str):
    members = [cases.draw(name, (2, 2, 16, 8), device="cpu", dtype=torch.float32) for _ in range(2)]
    names = [key for key, x in members[0].items() if isinstance(x, torch.Tensor)]
    places = members[0]["places"]
    stacked = [torch.stack([member[key] for member in members]) for key in names]

    def call(*own: torch.Tensor) -> dict[str, torch.Tensor]:
        return cases.step(cases.FORMS[name], dict(zip(names, own, strict=True)) | {"places": places})

    with use_backend("triton"), poisoned():
        mapped = torch.vmap(call)(*stacked)
        looped = [cases.step(cases.FORMS[name], member) for member in members]
    for key, tensor in mapped.items():
        torch.testing.assert_close(tensor, torch.stack([one[key] for one in looped]))


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_as_one_graph(in_place: bool):
    tensors = cases.draw("gated_delta_net", (2, 2, 16, 8), device="cpu", dtype=torch.float32)
    form = cases.FORMS["gated_delta_net"]
    with use_backend("triton"):
        want = cases.step(form, tensors)

        def call(own: dict) -> dict[str, torch.Tensor]:
            if not in_place:
                return cases.step(form, own)
            with torch.no_grad(), states_in_place():
                return cases.step(form, own)

        got = torch.compile(call, backend="aot_eager", fullgraph=True)(tensors)
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name])


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("in_place", [False, True])
def test_mixers_decode_with_it(name: str, in_place: bool):
    """`step` and `forward` of one token equal the mixer's own recurrence in fp64, and write over a state if they may."""
    kind = catalog.load("mixer", name)
    for options in kind.variants:
        mixer, x = kind(16, **options), torch.randn(2, 5, 16)
        with torch.no_grad():
            state = mixer(x, mixer.init_state(2, 8))[1]
            exact, wide = copy.deepcopy(mixer).double(), {key: tensor.double() for key, tensor in state.items()}
            y, after = exact.step(x[:, -1].double(), wide)
            for call in (mixer.step, lambda x, s, mixer=mixer: mixer(x[:, None], s)):
                given = {key: tensor.clone() for key, tensor in state.items()}
                with use_backend("triton"), watched() as seen, poisoned(), states_in_place() if in_place else nullcontext():
                    got, new = call(x[:, -1], given)
                taylor = options.get("feature_map") == "taylor2"
                assert taylor or "layer_step" in seen
                assert not in_place or taylor or new["s"] is given["s"]
                require_close({"y": got.view(2, 16), **new}, {"y": y, **after}, 2 * SINGLE)
