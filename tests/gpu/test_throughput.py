"""Every row of `bench throughput` has a green gate and both clocks on a CUDA device, and runs the Triton form."""

from __future__ import annotations

import pytest
import torch

from bench.throughput.measure import Session
from bench.throughput.names import KERNELS, KernelName
from bench.throughput.plan import Row

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def session() -> Session:
    """One for all rows."""
    return Session(torch.device("cuda"), with_peers=False)


@pytest.mark.parametrize("name", KERNELS)
def test_rows_are_right_and_timed(name: KernelName, session: Session) -> None:
    """Training rows last, since what an earlier one leaves behind must not break their capture."""
    kernel = KERNELS[name]
    for mode in ("forward", *(("decode",) if "decode" in kernel.modes else ()), "train"):
        record = session.measure(Row("kernel", name, mode, 2, 320, 2, kernel.widths[0], "bf16"))
        assert (record.status, record.reason) == ("done", ""), mode
        assert record.gate.passed
        assert record.graph is not None
        assert record.eager is not None
        assert record.path == ("torch" if name == "attention" and mode != "decode" else "triton")
