"""The vector-gate kernels in fp32 in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from kernels.dispatch import use_backend
from kernels.dplr import dplr_recurrence
from kernels.recurrence import linear_recurrence
from kernels.vector_gates import vector_gate, vector_gate_config
from tests.kernels import cases_vector_gate as cases


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("gate", cases.GATES)
def test_gates(gate: str, delta: bool):
    cases.check((1, 37, 2, 20, 33), gate, "cpu", torch.float32, delta=delta, state=True)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16, 16), (2, 16, 1, 16, 40)])
def test_shapes(shape: tuple[int, int, int, int, int], delta: bool):
    cases.check(shape, "weak", "cpu", torch.float32, delta=delta, state=False)


@pytest.mark.parametrize("gate", cases.GATES_OF_PAIRS)
def test_diagonal_plus_rank_one(gate: str):
    cases.check_dplr((1, 19, 2, 20, 17), gate, "cpu", torch.float32, state=True)


def test_pairs_of_tokens():
    q, k, a, b, z = (torch.randn(2, 3, 2, 20, requires_grad=True) for _ in range(5))
    v = torch.randn(2, 3, 2, 17, requires_grad=True)
    state = torch.randn(2, 2, 20, 17, requires_grad=True)
    torch.library.opcheck(torch.ops.mixer_bench.dplr.default, (q, k, v, a, b, z.detach().abs().neg(), state, True, False))

    def call(q: torch.Tensor) -> torch.Tensor:
        return dplr_recurrence(q, k, v, a, b, log_decay_BTHK=-z.abs())[0]

    with use_backend("triton"):
        torch.testing.assert_close(torch.vmap(call)(torch.stack((2 * q, q)))[1], call(q))


@pytest.mark.parametrize("delta", [False, True])
def test_the_chunks_of_sixteen_bit(delta: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vector_gate_config, "FP32", vector_gate_config.SIXTEEN_BIT)
    cases.check((1, 70, 1, 24, 16), "strong", "cpu", torch.float32, delta=delta, state=True)


def test_split_over_programs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vector_gate, "SEGMENT", 1)
    cases.check((1, 70, 2, 20, 33), "strong", "cpu", torch.float32, delta=False, state=True)
    cases.check((1, 70, 1, 16, 16), "weak", "cpu", torch.float32, delta=False, state=False)


@pytest.mark.parametrize("delta", [False, True])
def test_members(delta: bool):
    cases.check_members("cpu", delta=delta)


def test_split_equals_whole():
    cases.check_split((0, 1, 16, 23, 40), "cpu", torch.float32, delta=True)


def test_nested_gradients():
    cases.check_nested_gradients("cpu")


def test_strided_inputs_and_narrow_gates():
    tensors = cases.draw((1, 20, 2, 16, 16), "weak", delta=True, state=False)
    spread = {name: torch.stack((x, x), -1)[..., 0] for name, x in tensors.items()}
    rounded = {name: x.bfloat16() if name in ("log_decay", "beta_BTH") else x for name, x in tensors.items()}
    with use_backend("triton"):
        want = cases.call(linear_recurrence, tensors)[0]
        assert torch.equal(cases.call(linear_recurrence, spread)[0], want)
        leaves = {name: x.requires_grad_() for name, x in rounded.items()}
        found = cases.with_gradients(linear_recurrence, leaves)
    assert found["log_decay"].dtype == found["beta_BTH"].dtype == torch.bfloat16


def test_the_future_is_never_read():
    tensors = cases.draw((1, 40, 1, 16, 16), "weak", delta=True, state=False)
    with use_backend("triton"):
        before = cases.call(linear_recurrence, tensors)[0]
        for name in ("q", "k", "v"):
            tensors[name][:, 35:] += 1
        assert torch.equal(before[:, :35], cases.call(linear_recurrence, tensors)[0][:, :35])


def test_compiles_without_graph_breaks():
    tensors = cases.draw((1, 18, 1, 16, 16), "weak", delta=True, state=True)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    with use_backend("triton"):
        want = cases.with_gradients(linear_recurrence, leaves)
        got = cases.with_gradients(torch.compile(linear_recurrence, backend="aot_eager", fullgraph=True), leaves)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("delta", [False, True])
def test_torch_accepts_the_operator(delta: bool):
    tensors = {name: x.requires_grad_() for name, x in cases.draw((1, 18, 1, 16, 16), "weak", delta=delta, state=True).items()}
    arguments = (
        *(tensors[name] for name in ("q", "k", "v", "log_decay")),
        tensors.get("beta_BTH"),
        None,
        tensors["state_BHKV"],
        True,
        False,
    )
    torch.library.opcheck(torch.ops.mixer_bench.vector_gate_recurrence.default, arguments)


def test_shared_heads_are_refused():
    tensors = cases.draw((1, 4, 2, 16, 16), "weak", delta=False, state=False)
    with pytest.raises(ValueError, match="q and k have 1 heads and v 2"):
        cases.call(linear_recurrence, tensors | {name: tensors[name][:, :, :1] for name in ("q", "k")})
