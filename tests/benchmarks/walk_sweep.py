"""Times configurations of the Triton walks on a CUDA device: python -m tests.benchmarks.walk_sweep OUT.json [--seconds 100].

Every configuration is compiled and compared with the torch form in fp64 by one of many processes, then timed by a process of
its own, which is started again should a kernel break the device. Forward and backward are timed apart; rows are those of
`tests.benchmarks.linear_recurrence`, the record says what each table of `kernels.walk` held.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from kernels import scan_segments_triton, walk, walk_pieces
from kernels.walk import Backward, Config

MAIN, SHARED = (8, 2048, 16, 16), (8, 2048, 1, 16)
LENGTHS = ((32, 512), (2, 8192), (1, 32768))


class Trial(NamedTuple):
    """A row and what differs from the shipped tables.

    Args:
        kind: forward, backward or scan.
        shape: batch, length, groups, heads, key width, value width; for a scan batch, length, channels.
        gate: none, constant or scalar.
        changed: by table, what it holds for these widths; or a constant of `walk_pieces` or `scan_segments_triton`.
    """

    kind: str
    shape: tuple[int, ...]
    gate: str = "none"
    changed: dict[str, Any] = {}  # noqa: RUF012 - never written to


def trials() -> Iterator[Trial]:
    """Everything that is swept, the most wanted first."""
    c = Config
    forward = {
        (64, 64): (c(64, 64, 4, 3), c(64, 64, 4, 4), c(64, 32, 4, 3), c(32, 64, 4, 3)),
        (128, 128): (c(64, 64, 4, 2), c(64, 64, 4, 3), c(32, 64, 4, 3), c(32, 64, 4, 4)),
        (128, 64): (c(64, 64, 4, 2), c(64, 64, 4, 3), c(64, 32, 4, 3), c(32, 64, 4, 3)),
    }
    backward = {
        (64, 64): (
            Backward(c(64, 64, 4, 3), together=True),
            Backward(c(64, 64, 4, 3), together=True, turned=True),
            Backward(c(64, 64, 4, 2), together=True, turned=True),
            Backward(c(32, 64, 4, 3), together=True),
            Backward(c(64, 64, 4, 3), c(64, 64, 4, 3), together=True),
        ),
        (128, 128): (
            Backward(c(64, 64, 4, 2), c(64, 128, 8, 2), together=True, turned=True),
            Backward(c(64, 64, 4, 2), c(32, 128, 8, 3), together=True, turned=True),
            Backward(c(64, 64, 4, 2), c(64, 64, 4, 2)),
            Backward(c(64, 64, 4, 2), c(64, 64, 4, 1)),
            Backward(c(32, 64, 4, 3), c(32, 64, 4, 3)),
        ),
        (128, 64): (
            Backward(c(64, 128, 4, 1), together=True),
            Backward(c(64, 64, 4, 2), c(64, 64, 4, 2), together=True, turned=True),
            Backward(c(64, 64, 4, 2), c(64, 64, 4, 1), together=True),
            Backward(c(64, 64, 4, 2), c(32, 64, 4, 3), together=True, turned=True),
            Backward(c(32, 64, 4, 3), c(32, 64, 4, 3), together=True),
            Backward(c(64, 64, 4, 2), c(64, 64, 4, 2)),
        ),
    }
    for widths, configs in backward.items():
        shape = (*(SHARED if widths == (128, 64) else MAIN), *widths)
        for gate in ("none", "scalar"):
            yield from (Trial("backward", shape, gate, {"BACKWARD_16": config}) for config in configs)
            yield from (Trial("forward", shape, gate, {"FORWARD_16": config}) for config in forward[widths])
    for widths in backward:
        base = SHARED if widths == (128, 64) else MAIN
        for batch, length in LENGTHS:
            for gate in ("none", "scalar"):
                yield from (Trial(kind, (batch, length, *base[2:], *widths), gate) for kind in ("forward", "backward"))
        yield from (Trial(kind, (*base, *widths), "constant") for kind in ("forward", "backward"))
    for config in (c(64, 64, 4, 5), c(64, 128, 8, 3)):
        yield Trial("forward", (2, 8192, 16, 16, 128, 128), "none", {"SEGMENT_16": config})
    yield Trial("forward", (2, 8192, 16, 16, 64, 64), "none", {"SEGMENT_16": c(64, 64, 4, 5)})
    yield Trial("forward", (2, 8192, 16, 16, 128, 128), "none", {"SEGMENTS_AT_ONCE": 128})
    for batch, length in ((8, 2048), *LENGTHS):
        yield from (Trial("scan", (batch, length, 4096), "none", {"PROGRAMS": programs}) for programs in (2048, 4096))


@contextmanager
def tables(trial: Trial) -> Iterator[None]:
    """The shipped tables with the trial's changes."""
    homes = {"SEGMENTS_AT_ONCE": walk_pieces, "HEADS_AT_ONCE": walk_pieces, "PROGRAMS": scan_segments_triton}
    with ExitStack() as stack:
        for name, value in trial.changed.items():
            home = homes.get(name, walk)
            held = value if name in homes else {(256, 256) if name.startswith("BACKWARD") else 256: value}
            stack.enter_context(mock.patch.object(home, name, held))
        yield


def compare(trial: Trial) -> dict[str, Any]:
    """Errors of a shorter problem with as many pieces as the timed one."""
    from tests.benchmarks import linear_recurrence as rows

    if trial.kind == "scan":
        return {"errors": scan_errors(trial)}
    batch, length, groups, heads, *widths = trial.shape
    whole = walk_pieces.n_segments(batch * heads, length, shared=groups < heads) == 1
    shape = (2, 150, 1 if groups < heads else 3, 3, *widths)
    with tables(trial), mock.patch.object(walk_pieces, "SHORTEST_SEGMENT", 512 if whole else 50):
        return {"errors": rows.errors(rows.draw(shape, trial.gate, 150))}


def scan_errors(trial: Trial) -> dict[str, float]:
    """Errors of a short scan in segments."""
    import torch

    from kernels import scan_triton
    from kernels.reference import scan_reference
    from tests.kernels.oracle import rms_error

    a, x = torch.rand(2, 600, 100, device="cuda").bfloat16(), torch.randn(2, 600, 100, device="cuda").bfloat16()
    with tables(trial):
        h = scan_triton.forward(a, x, None)
        da, dx, _ = scan_triton.backward(torch.ones_like(h), a, h, None)
    exact = [leaf.double().requires_grad_() for leaf in (a, x)]
    want = scan_reference(*exact)
    true = (want, *torch.autograd.grad(want.sum(), exact))
    return {name: rms_error(got, y) for name, got, y in zip(("h", "da", "dx"), (h, da, dx), true, strict=True)}


def measure(trial: Trial) -> dict[str, Any]:
    """Milliseconds; a device that a kernel broke ends the process."""
    import torch

    from tests.benchmarks import linear_recurrence as rows

    try:
        if trial.kind == "scan":
            return scan_times(trial)
        problem = rows.draw(trial.shape, trial.gate, trial.shape[1])
        q, k, v = (problem.inputs[name].detach() for name in ("q_BTGK", "k_BTGK", "v_BTHV"))
        decay = problem.inputs.get("log_decay")
        decay = None if decay is None else decay.detach() if trial.gate == "scalar" else decay.detach()[None]
        with tables(trial):
            if trial.kind == "forward":
                return {"ms": rows.graph_ms(lambda: walk.forward(q, k, v, decay, None, None, return_state=False))}
            entering = walk.forward(q, k, v, decay, None, None, return_state=False)[2]
            inputs = (q, k, v, decay, None, None, entering, problem.do, None, None)
            return {"ms": rows.graph_ms(lambda: walk.backward(*inputs, gate_grad=trial.gate == "scalar"))}
    except torch.AcceleratorError:
        os._exit(1)


def scan_times(trial: Trial) -> dict[str, float]:
    """Forward, and forward with backward."""
    import torch

    from kernels import scan_triton
    from tests.benchmarks.linear_recurrence import graph_ms

    a, x = torch.rand(trial.shape, device="cuda").bfloat16(), torch.randn(trial.shape, device="cuda").bfloat16()
    with tables(trial):
        h = scan_triton.forward(a, x, None)
        forward = graph_ms(lambda: scan_triton.forward(a, x, None))
        return {"ms": forward, "backward_ms": graph_ms(lambda: scan_triton.backward(x, a, h, None))}


def outcome(future: Future[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What a process found, or why it found nothing."""
    try:
        return future.result(timeout=max(1.0, seconds))
    except Exception as error:  # one broken trial must not end the sweep
        return {"error": repr(error)[:200]}


def main() -> None:
    """Compares, then times as long as there is time, and writes after every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    began = time.monotonic()
    todo, context = list(trials()), get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=context) as pool:
        futures = [pool.submit(compare, trial) for trial in todo]
        found = [outcome(future, arguments.seconds / 2 - (time.monotonic() - began)) for future in futures]
    print(f"compared after {time.monotonic() - began:.0f} s", flush=True)
    from tests.benchmarks.facts import facts

    record, pool = facts("python -m tests.benchmarks.walk_sweep"), ProcessPoolExecutor(1, mp_context=context)
    rows: list[dict[str, Any]] = []
    for trial, errors in zip(todo, found, strict=True):
        row = trial._asdict() | errors
        good = all(error <= (2e-2 if name == "log_decay" else 5e-3) for name, error in row.get("errors", {"": 1.0}).items())
        if good and time.monotonic() - began < arguments.seconds:
            row |= outcome(pool.submit(measure, trial), 30)
            if "ms" not in row:
                pool = ProcessPoolExecutor(1, mp_context=context)
        rows.append(row)
        arguments.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
        said = row.get("error") or (round(row["ms"], 4) if "ms" in row else row["errors"])
        print(trial.kind, trial.shape, trial.gate, trial.changed, said, row.get("backward_ms", ""), flush=True)
    pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
