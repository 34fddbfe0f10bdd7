"""The torch form of reading a sequence for a few queries, and what its Triton form takes on sm_90."""

import pytest
import torch

from kernels.between.rows_triton import LEAST_ROWS, WARPS, read_rows_dq, read_rows_dx, read_rows_forward, tiles
from kernels.dispatch import use_backend
from kernels.rows import MOST_WIDTH, pick_rows, read_rows
from tests.kernels import cases_rows as cases
from tests.kernels.offline import compile_sm90


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", cases.WEIGHTS)
@pytest.mark.parametrize("shape", cases.SHAPES[:3])
def test_torch_form(shape: tuple[int, int, int, int, int], kind: tuple[str, float | None], window: int | None):
    cases.check_torch_form(shape, kind, window)


def test_picked_rows_and_their_gradient():
    """A repeated position takes the gradient of its first place, as padding needs it."""
    x = torch.randn(2, 6, 3, requires_grad=True)
    rows = torch.tensor([[4, 0, 4], [2, 5, 2]])
    picked = pick_rows(x, rows)
    assert torch.equal(picked, torch.stack([x[b, rows[b]] for b in range(2)]))
    weight = torch.randn(2, 3, 3)
    (gradient,) = torch.autograd.grad((picked * weight).sum(), x)
    expected = torch.zeros(2, 6, 3)
    for b in range(2):
        expected[b, rows[b, :2]] = weight[b, :2]
    assert torch.equal(gradient, expected)


def test_wide_rows_take_the_torch_form(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kernels.dispatch._interpreted", True)
    wide = MOST_WIDTH + 1
    with use_backend("triton"), pytest.raises(ValueError, match=f"width {wide} is above {MOST_WIDTH}"):
        read_rows(torch.randn(1, 1, 1, wide), torch.randn(1, 2, wide), torch.zeros(1, 1, dtype=torch.long), weights="softmax")


@pytest.mark.parametrize(("rows", "width"), [(4, 128), (64, 64), (64, 128), (64, MOST_WIDTH)])
@pytest.mark.parametrize("kernel", [read_rows_forward, read_rows_dq, read_rows_dx], ids=lambda kernel: kernel.__name__)
def test_compiles_for_sm90_without_spills(kernel, rows: int, width: int):
    narrow = dict.fromkeys(("q_ptr", "x_ptr", "y_ptr", "dy_ptr", "dq_ptr", "dx_ptr"), "*bf16+")
    sizes = {"place_ptr": "*i64+", "scale_ptr": "*fp32+", "n_rows": "i32", "n_tokens": "i32", "window": "i32", "width": "i32+"}
    flags = {
        "eps": "fp32",
        "TAYLOR": True,
        "DIVIDED": True,
        "WINDOW": True,
        **tiles(LEAST_ROWS if kernel is read_rows_dx else rows, width),
    }
    every = narrow | sizes | flags
    used = compile_sm90(kernel, {name: every[name] for name in kernel.arg_names}, warps=WARPS)
    assert used.spilled == 0
    assert used.shared <= 112 * 1024, "fewer than two programs fit an SM"
