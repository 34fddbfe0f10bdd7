"""The Triton decoding step in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.step import recurrent_step, states_in_place
from tests.kernels import cases_step as cases
from tests.kernels.oracle import poisoned


@pytest.mark.parametrize("option", cases.OPTIONS, ids=str)
def test_equals_the_definition(option: tuple[str, bool]):
    for shape in cases.SHAPES:
        cases.check(shape, option, "cpu", torch.float32)


def test_sixteen_bit_state():
    cases.check((2, 1, 2, 16, 24), ("scalar", True), "cpu", torch.float32, torch.float16)


@pytest.mark.parametrize("shape", cases.SHAPES)
def test_rank_one(shape: tuple[int, ...]):
    cases.check_rank_one(shape, "cpu", torch.float32)


def test_wide_keys():
    cases.check((1, 1, 1, 300, 7), ("none", False), "cpu", torch.float32)


@pytest.mark.parametrize("option", [("constant", False), ("scalar", True), ("vector", True), ("rank one", False)])
def test_members(option: tuple[str, bool]):
    gate = "vector" if option[0] == "rank one" else option[0]
    drawn = cases.draw((2, 1, 2, 16, 8), gate, delta=option[1], device="cpu", dtype=torch.float32, state=torch.float32)
    members = [cases.with_rank_one(drawn) if option[0] == "rank one" else drawn] * 3
    members = [{name: torch.rand_like(x) * (-1 if name == "log_decay" else 1) for name, x in member.items()} for member in members]
    names = list(members[0])
    stacked = [torch.stack([member[name] for member in members]) for name in names]
    with use_backend("triton"), poisoned():
        mapped = torch.vmap(lambda *own: cases.step(dict(zip(names, own, strict=True))))(*stacked)
        looped = [cases.step(member) for member in members]
    for name, tensor in mapped.items():
        torch.testing.assert_close(tensor, torch.stack([one[name] for one in looped]))


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_as_one_graph(in_place: bool):
    tensors = cases.draw((2, 1, 2, 16, 8), "scalar", delta=True, device="cpu", dtype=torch.float32, state=torch.float32)
    with use_backend("triton"):
        want = cases.step(tensors)

        def call(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if not in_place:
                return cases.step(own)
            with torch.no_grad(), states_in_place():
                return cases.step(own)

        got = torch.compile(call, backend="aot_eager", fullgraph=True)(tensors)
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name])


def test_the_recurrence_decodes_with_it():
    """A token after a state takes the step, unless a gradient is to come; both forms agree."""
    tensors = cases.draw((2, 2, 2, 16, 8), "none", delta=False, device="cpu", dtype=torch.float32, state=torch.float32)
    q, k, v = (tensors[name][:, None] for name in ("q", "k", "v"))
    with use_backend("triton"):
        o, new = linear_recurrence(q, k, v, state_BHKV=tensors["state"])
        walked, final = linear_recurrence(q.requires_grad_(), k, v, state_BHKV=tensors["state"])
        with torch.no_grad(), states_in_place():
            _, same = linear_recurrence(q, k, v, state_BHKV=tensors["state"])
    assert walked.requires_grad and not o.requires_grad
    assert same is tensors["state"]
    torch.testing.assert_close((o, new), (walked.detach(), final.detach()))


@pytest.mark.parametrize("operator", ["recurrent_step", "recurrent_step_"])
def test_operator_is_registered_right(operator: str):
    tensors = cases.draw((2, 1, 2, 16, 8), "scalar", delta=True, device="cpu", dtype=torch.float32, state=torch.float32)
    arguments = [tensors.get(name) for name in ("q", "k", "v", "log_decay", "beta", "a", "b", "state")]
    torch.library.opcheck(getattr(torch.ops.mixer_bench, operator).default, arguments)


def test_bad_input_is_named():
    x, state = torch.randn(2, 1, 16), torch.randn(2, 1, 16, 16)
    with pytest.raises(ValueError, match="state has shape"):
        recurrent_step(x, x, x, state[:1])
    with pytest.raises(ValueError, match="log_decay has shape"):
        recurrent_step(x, x, x, state, log_decay=torch.zeros(3))
    with pytest.raises(ValueError, match="multiple"):
        recurrent_step(x.expand(2, 2, 16), x.expand(2, 2, 16), x, state)
    with use_backend("triton"), pytest.raises(ValueError, match="float64"):
        recurrent_step(x, x, x, state.double())
