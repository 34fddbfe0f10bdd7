"""Time steps of heads: their definition, members, and that a compiler does not look into them."""

import pytest
import torch
from torch.nn import functional as F

from kernels.time_steps import time_steps


def leaves(*leading: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw steps that are a part of wider rows, and a bias."""
    wide = torch.randn(*leading, 2, 5, 12, dtype=torch.float64, requires_grad=True)
    return wide, torch.randn(*leading, 3, dtype=torch.float64, requires_grad=True)


def test_is_a_softplus_with_its_gradients():
    wide, bias = leaves()
    got = time_steps(wide[..., 4:7], bias)
    torch.testing.assert_close(got, F.softplus(wide[..., 4:7] + bias))
    assert torch.autograd.gradcheck(lambda wide, bias: time_steps(wide[..., 4:7], bias), (wide, bias))


def test_sixteen_bits_are_widened_and_gradients_have_the_dtype_of_their_tensors():
    raw, bias = torch.randn(2, 5, 3, dtype=torch.bfloat16, requires_grad=True), torch.randn(3, requires_grad=True)
    got = time_steps(raw, bias)
    assert got.dtype == torch.float32
    assert [x.dtype for x in torch.autograd.grad(got.sum(), (raw, bias))] == [torch.bfloat16, torch.float32]


def test_members():
    wide, bias = leaves(4)
    together = torch.vmap(lambda wide, bias: time_steps(wide[..., 4:7], bias))(wide, bias)
    alone = torch.stack([time_steps(wide[i][..., 4:7], bias[i]) for i in range(4)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), (wide, bias)) for y in (together, alone)))


def test_a_compiler_does_not_make_them_again():
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    raw, bias = torch.randn(2, 5, 3), torch.randn(3)
    compiled = torch.compile(time_steps, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(raw, bias), time_steps(raw, bias))
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("mixer_bench.time_steps" in target for target in targets), targets
    assert not any("softplus" in target for target in targets), targets


def test_operator_is_registered_right():
    raw, bias = torch.randn(4, 5, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.mixer_bench.time_steps.default, (raw, bias))


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match=r"bias has shape \(4,\); with raw of shape \(2, 5, 3\) it is \(3,\)"):
        time_steps(torch.randn(2, 5, 3), torch.randn(4))
