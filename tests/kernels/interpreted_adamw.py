"""The Triton AdamW in the interpreter; run by `test_interpreted.py` in a process of its own."""

import pytest

from tests.kernels import cases_adamw as cases


@pytest.mark.parametrize(("members", "parameters"), cases.SHAPES)
def test_steps(members: int, parameters: int):
    cases.check_steps(members, parameters, "cpu", "triton")
