"""A window's fused decoding step in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest
import torch
from torch.func import vmap

from bench import catalog
from kernels.dispatch import use_backend, watched
from kernels.window_step import Stored, window_step
from tests.kernels import cases_window_step as cases
from tests.kernels.oracle import SINGLE, rms_error


@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, ...], backend: str):
    cases.check(shape, "cpu", torch.float32, backend=backend)


def test_vmap_equals_loop():
    members = [cases.draw(cases.SHAPES[n], device="cpu", dtype=torch.float32) for n in (0, 0)]
    flat = [torch.stack(x) for x in zip(*((*q_k_v, *stored) for *q_k_v, stored in members), strict=True)]

    def step(q, k, v, *stored):
        y, new = window_step(q, k, v, Stored(*stored), window=21)
        return (y, *new)

    with use_backend("triton"):
        together = vmap(step)(*flat)
        for n, (*q_k_v, stored) in enumerate(members):
            for found, wanted in zip(together, step(*q_k_v, *stored), strict=True):
                torch.testing.assert_close(found[n], wanted)


def test_a_mixer_decodes_with_it():
    mixer = catalog.load("mixer", "sliding_window")(16, n_heads=2, window=5)
    x = torch.randn(2, 12, 16)
    wanted, _ = mixer(x)
    state = mixer.init_state(2, 12)
    found = []
    with torch.no_grad(), use_backend("triton"), watched() as seen:
        for token in x.split(1, 1):
            y, state = mixer(token, state)
            found.append(y)
    assert seen["window_step"] == "triton"
    assert rms_error(torch.cat(found, 1), wanted) <= SINGLE
