"""The fused decoding step of a window that keeps keys, in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch

from bench.convert.kept import KeptKeys
from kernels.dispatch import use_backend, watched
from tests.kernels import cases_kept_step as cases
from tests.kernels.oracle import SINGLE, rms_error


@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, ...], backend: str):
    cases.check(shape, "cpu", torch.float32, backend=backend)


def test_a_branch_decodes_with_it():
    branch = KeptKeys(2, 8, 12, window=5, kept=4, sinks=2)
    q, k, v, x = (torch.randn(2, *shape) for shape in ((4, 20, 8), (2, 20, 8), (2, 20, 8), (20, 12)))
    found, state = [], branch.init_state(2, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        wanted, _ = branch(q, k, v, None, x)
        with use_backend("triton"), watched() as seen:
            for t in range(20):
                y, state = branch(*(a[:, :, t : t + 1] for a in (q, k, v)), state, x[:, t : t + 1])
                found.append(y)
    assert seen["kept_step"] == "triton"
    assert rms_error(torch.cat(found, 2), wanted) <= SINGLE
