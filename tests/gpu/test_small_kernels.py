"""Attention and the small fused kernels on a CUDA device: exact in three dtypes, as members, and captured in a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, attention_reference, band_mask, banded_attention
from kernels.conv import long_conv, short_conv
from kernels.cross_entropy import labelled_cross_entropy
from kernels.scan import scan, selective_scan
from kernels.scans.scan_operator import OWN_STATES
from tests.kernels import (
    cases_adamw,
    cases_cross_entropy,
    cases_gated_conv,
    cases_gated_norm,
    cases_norms,
    cases_rows,
    cases_scan,
    cases_selective_scan,
    cases_short_conv,
)
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, require_close

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Outputs without their graph: gradients remember the stream of the first graph of a leaf that is still alive."""
    return [x.detach() for x in call()]


def replayed(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a captured call leaves behind after two replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = eager(call)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    return outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [20, 64, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_members(masked: bool, width: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(3, 4, 5, 2, 77, width, device="cuda").to(dtype).requires_grad_()
    mask = band_mask(77, 77, window=9, device="cuda")
    weight = torch.randn(4, 5, 2, 77, width, device="cuda").to(dtype)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask_TS=mask) if masked else attention(q, k, v, causal=True)

    def both() -> list[Tensor]:
        y = torch.vmap(call)(*qkv)
        return [y, torch.autograd.grad(y, qkv, weight)[0]]

    exact = qkv.detach().double().requires_grad_()
    true = attention_reference(*exact, mask if masked else band_mask(77, 77, device="cuda"))
    wanted = {"y": true, "gradient": torch.autograd.grad(true, exact, weight.double())[0]}
    tolerance = 3 * SINGLE if dtype == torch.float32 else SIXTEEN_BIT
    require_close(dict(zip(wanted, eager(both), strict=True)), wanted, tolerance)
    require_close(dict(zip(wanted, replayed(both), strict=True)), wanted, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "sinks"), [(64, 0), (64, 3), (5, 0)])
def test_banded_attention_of_members(window: int, sinks: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(3, 4, 5, 2, 200, 64, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(4, 5, 2, 200, 64, device="cuda").to(dtype)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sink_kv = (k[:, :, :sinks], v[:, :, :sinks]) if sinks else None
        return banded_attention(q, k, v, window=window, sink_kv=sink_kv)

    y = torch.vmap(call)(*qkv)
    exact = qkv.detach().double().requires_grad_()
    true = attention_reference(*exact, band_mask(200, 200, window=window, sinks=sinks, device="cuda"))
    got = {"y": y, "gradient": torch.autograd.grad(y, qkv, weight)[0]}
    wanted = {"y": true, "gradient": torch.autograd.grad(true, exact, weight.double())[0]}
    require_close(got, wanted, 3 * SINGLE if dtype == torch.float32 else SIXTEEN_BIT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [*cases_cross_entropy.SHAPES, (70_000, 33), (300, 128_256)])
def test_cross_entropy(rows: int, classes: int, dtype: torch.dtype) -> None:
    cases_cross_entropy.check_rows(rows, classes, "cuda", dtype)


def test_cross_entropy_of_members_and_faults() -> None:
    cases_cross_entropy.check_members("cuda")
    cases_cross_entropy.check_faults("cuda")


def test_cross_entropy_in_a_graph() -> None:
    logits = torch.randn(4, 100, 8192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(8192, (4, 100), device="cuda")

    def both() -> list[Tensor]:
        loss, predicted = torch.vmap(labelled_cross_entropy)(logits, labels)
        return [loss, predicted, torch.autograd.grad(loss.sum(), logits)[0]]

    for at_once, captured in zip(eager(both), replayed(both), strict=True):
        assert torch.equal(at_once, captured)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (4, 8, 1, 2),
        (3, 17, 40, 3),
        (2, 300, 256, 16),
        (1, 1000, 72, 16),
        (70_000, 2, 5, 1),
        (1, 5000, 33, 64),
        *((50, length, 544, n_states) for n_states in OWN_STATES for length in (17, 32)),
    ],
)
def test_selective_scan(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    cases_selective_scan.check(shape, "cuda", dtype)
    cases_selective_scan.check_gated(shape, "cuda", dtype)
    cases_selective_scan.check_stepped(shape, "cuda", dtype)


@pytest.mark.parametrize("strength", [0.0, 10.0, 100.0])
def test_selective_scan_with_weak_and_strong_decay(strength: float) -> None:
    cases_selective_scan.check((2, 100, 40, 16), "cuda", torch.float32, strength=strength)


def test_selective_scan_of_members_and_in_a_graph() -> None:
    cases_selective_scan.check_members("cuda")
    for n_states in OWN_STATES:
        cases_selective_scan.check_members("cuda", (50, 32, 544, n_states), torch.bfloat16)
    cases_selective_scan.check_shared_input("cuda")
    leaves = [tensor.cuda().requires_grad_() for tensor in cases_selective_scan.draw(2, 100, 64, 16, leading=(3,))[:5]]

    def both() -> list[Tensor]:
        y = torch.vmap(lambda *own: selective_scan(*own)[0])(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    for at_once, captured in zip(eager(both), replayed(both), strict=True):
        assert torch.equal(at_once, captured)


@pytest.mark.parametrize("options", cases_short_conv.OPTIONS)
def test_short_conv_options(options: tuple[int, bool, bool, bool]) -> None:
    cases_short_conv.check((2, 33, 65), options, "cuda", torch.float32)
    cases_short_conv.check_step(options, "cuda", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*cases_short_conv.SHAPES, (3, 300, 128), (70_000, 2, 16), (2048, 16, 128), (1000, 40, 288)])
def test_short_conv(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The last two are whole runs, two of them a walk."""
    cases_short_conv.check_two_terms(shape, "cuda", dtype)
    cases_short_conv.check(shape, (4, True, True, False), "cuda", dtype)
    cases_short_conv.check_step((4, True, True, False), "cuda", dtype)


def test_short_conv_of_members_and_in_a_graph() -> None:
    cases_short_conv.check_members("cuda")
    x, weight = torch.randn(3, 2, 100, 64, device="cuda").requires_grad_(), torch.randn(3, 64, 4, device="cuda").requires_grad_()

    def both() -> list[Tensor]:
        y = torch.vmap(lambda x, weight: short_conv(x, weight, silu=True)[0])(x, weight)
        return [y, *torch.autograd.grad(y.square().sum(), (x, weight))]

    for at_once, captured in zip(eager(both), replayed(both), strict=True):
        assert torch.equal(at_once, captured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_conv_of_members_in_a_graph(dtype: torch.dtype) -> None:
    """By FFT: under vmap, autocast and capture, against fp64."""
    x = torch.randn(3, 2, 100, 16, device="cuda").to(dtype).requires_grad_()
    taps = torch.randn(3, 16, 100, device="cuda").requires_grad_()

    def call(x: Tensor, taps: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return long_conv(x, taps)

    def both() -> list[Tensor]:
        y = torch.vmap(call)(x, taps)
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, taps))]

    exact = [leaf.detach().double().requires_grad_() for leaf in (x, taps)]
    true = torch.vmap(long_conv)(*exact)
    wanted = dict(zip(("y", "dx", "dtaps"), [true, *torch.autograd.grad(true.square().sum(), exact)], strict=True))
    tolerance = SINGLE if dtype == torch.float32 else SIXTEEN_BIT
    require_close(dict(zip(wanted, eager(both), strict=True)), wanted, tolerance)
    require_close(dict(zip(wanted, replayed(both), strict=True)), wanted, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 33, 40), (3, 300, 8, 16), (70_000, 2, 5), (1, 5000, 33)])
def test_scan(shape: tuple[int, ...], with_state: bool, dtype: torch.dtype) -> None:
    cases_scan.check(shape, "cuda", dtype, with_state=with_state)


def test_scan_of_members_and_in_a_graph() -> None:
    cases_scan.check_members("cuda")
    leaves = [tensor.cuda().requires_grad_() for tensor in cases_scan.draw((2, 100, 64), with_state=True)]

    def both() -> list[Tensor]:
        h = scan(*leaves)
        return [h, *torch.autograd.grad(h.square().sum(), leaves)]

    for at_once, captured in zip(eager(both), replayed(both), strict=True):
        assert torch.equal(at_once, captured)


@pytest.mark.parametrize(("members", "parameters"), [*cases_adamw.SHAPES, (12, 1_300_007)])
def test_adamw(members: int, parameters: int) -> None:
    cases_adamw.check_steps(members, parameters, "cuda", "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*cases_norms.SHAPES, (4, 200, 256), (2, 300, 1000)])
def test_norms(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    cases_norms.check_layer_norm(shape, "cuda", dtype, "triton")
    cases_norms.check_stream(shape, "cuda", dtype, "triton")
    for at_rows in (False, True):
        cases_norms.check_pair(shape, "cuda", dtype, "triton", at_rows=at_rows)


def test_norms_of_members() -> None:
    cases_norms.check_members("cuda", "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", [*cases_gated_norm.SHAPES, (4, 200, 256), (2, 300, 1000)])
def test_gated_norm(shape: tuple[int, int, int], norm: bool, dtype: torch.dtype) -> None:
    cases_gated_norm.check(shape, "cuda", dtype, "triton", norm=norm)
    cases_gated_norm.check_rows_for_two(shape, "cuda", dtype, "triton", norm=norm)


def test_gated_norm_of_members() -> None:
    cases_gated_norm.check_members("cuda", "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", cases_gated_conv.TAPS)
@pytest.mark.parametrize("shape", [*cases_gated_conv.SHAPES, (4, 256, 128)])
def test_gated_conv(shape: tuple[int, int, int], taps: int, dtype: torch.dtype) -> None:
    cases_gated_conv.check(shape, taps, "cuda", dtype, "triton")


def test_gated_conv_of_members() -> None:
    cases_gated_conv.check_members("cuda", "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "window"), [*((kind, None) for kind in cases_rows.WEIGHTS), (cases_rows.WEIGHTS[0], 70)])
@pytest.mark.parametrize("shape", [*cases_rows.SHAPES, (3, 2, 37, 200, 128), (2, 1, 5, 130, 256)])
def test_read_rows(
    shape: tuple[int, int, int, int, int], kind: tuple[str, float | None], window: int | None, dtype: torch.dtype
) -> None:
    cases_rows.check(shape, kind, window, "cuda", dtype)


def test_read_rows_of_members() -> None:
    cases_rows.check_members("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), cases_cross_entropy.SHAPES)
def test_labelled_head(rows: int, classes: int, dtype: torch.dtype) -> None:
    cases_cross_entropy.check_head(rows, classes, "cuda", dtype)
