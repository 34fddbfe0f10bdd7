"""Times kernels beside public peers on a CUDA device: python -m tests.benchmarks.peers STORE --kernels delta,gla [--widths 64,128].

The same rows as `bench throughput`, for a machine that is lent by the minute: peers are compiled by many processes at once
into a cache of their own, and their autotuners then take 3 ms of warm-up and 12 ms for each configuration, alone on the
device and at the timed shape. Compiling runs throw their timings away.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.store import Store
from bench.throughput.plan import Row, SpeedRequest, plan

MAIN_LENGTH = 2048


def shorten_tuning() -> None:
    """Gives every Triton autotuner made from now on a short clock, and forbids results of earlier processes."""
    os.environ["FLA_CACHE_RESULTS"] = "0"
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    real = Autotuner.__init__

    def shortened(self: Any, *args: Any, **named: Any) -> None:
        named["do_bench"] = partial(do_bench, warmup=3, rep=12)
        real(self, *args, **named)

    Autotuner.__init__ = shortened  # type: ignore[method-assign]


def compile_row(row: Row) -> float:
    """Runs a row with its peers, for what that leaves in Triton's cache."""
    shorten_tuning()
    import torch

    from bench.throughput.measure import Session

    began = time.monotonic()
    Session(torch.device("cuda"), with_peers=True).measure(row)
    return time.monotonic() - began


def main() -> None:
    """Compiles, then measures and stores every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--kernels", required=True)
    parser.add_argument("--widths", default="64,128")
    parser.add_argument("--lengths", default="2048,512,8192,32768")
    parser.add_argument("--modes", default="train")
    given = parser.parse_args()
    widths, lengths = ([int(part) for part in text.split(",")] for text in (given.widths, given.lengths))
    rows = plan(SpeedRequest(kernels=[given.kernels], widths=widths, lengths=lengths, modes=given.modes.split(",")), "cuda")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main_rows = [row for row in rows if row.length == MAIN_LENGTH and row.mode != "forward"]
        with ProcessPoolExecutor(16, mp_context=get_context("spawn")) as pool:
            print("compiled in", [round(seconds) for seconds in pool.map(compile_row, main_rows)], flush=True)
        measure(rows, Store(given.store))


def measure(rows: list[Row], store: Store) -> None:
    """Every row, the main length first, since autotuners keep what suits the first shape they see."""
    shorten_tuning()
    import torch

    from bench.throughput.measure import Session

    session = Session(torch.device("cuda"), with_peers=True)
    for row in sorted(rows, key=lambda row: row.length != MAIN_LENGTH):
        record = session.measure(row)
        store.write_speed(record)
        timing, ratio, over = record.timing(), record.bound_ratio(), record.peer_ratio()
        text = record.reason if timing is None else f"{timing.median_us:.1f} us, {ratio:.2f} x bound, {over or 0:.2f} x peer"
        peers = {peer.name: peer.reason[:80] or (peer.graph and round(peer.graph.median_us, 1)) for peer in record.peers}
        print(f"{row.text()}: {text} {peers}", flush=True)
        if session.lost:
            break


if __name__ == "__main__":
    main()
