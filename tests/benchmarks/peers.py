"""Times kernels beside public peers on a CUDA device, for a machine that is lent by the minute.

    python -m tests.benchmarks.peers compile [--kernels delta,gla] [--widths 64] [--lengths 2048] [--modes train]
    python -m tests.benchmarks.peers measure STORE [the same]

Both take the rows of `bench throughput --preset kernels`; at 16 heads peers stand beside ours. `compile` lets many
processes fill Triton's cache, each with a share of every autotuner's configurations, and launches none of them. `measure`
then tunes at the timed shape, the main length first, by 3 ms of warm-up and 12 ms for each configuration, and keeps what
was chosen in Triton's cache too: other lengths and later runs start with it, and `compile` compiles no more than that where
it is known.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import time
import types
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from bench.store import Store
from bench.throughput.plan import Row, SpeedRequest, plan
from bench.throughput.tuning import tune_by_width
from tests.benchmarks.speed_table import GOALS

MAIN_LENGTH, PEER_HEADS = 2048, 16
WITHOUT = (("gla", 64), ("kda", 64))
"""Rows without a goal, whose peers would take a minute more to tune."""
SLOWER = {64: ("chunk_retention", "chunk_simple_gla guard off"), 128: ("fused_chunk_linear_attn", "fused_chunk_simple_gla")}
"""Peers that are left out at a width, where another one of the same kernel is usually faster, to save their tuning."""
PARTS = 6
LENGTH_MATTERS, ENOUGH = ("ssd", "window", "chosen_blocks"), 512
"""Rows whose peers compile anew for some lengths, and a length that does for the peers of the others."""
UNTUNED, ALONE = "flash-qla", -1
"""A package that has no autotuners and compiles for minutes, by length too, and the number of the part that does."""
TUNERS: list[Any] = []
"""Every autotuner of this process."""


def rows_of(given: argparse.Namespace) -> list[Row]:
    """The rows asked for, those with a goal first, and of them the main length, which autotuners are to see first."""
    modes = given.modes.split(",")
    rows = plan(SpeedRequest(kernels=[given.kernels], preset="kernels", modes=modes), "cuda")
    widths, lengths = ([int(part) for part in text.split(",")] if text else None for text in (given.widths, given.lengths))
    kept = [row for row in rows if (not widths or row.width in widths) and (not lengths or row.length in lengths)]
    goals = {(goal.kernel, goal.width) for goal in GOALS}
    return sorted(kept, key=lambda row: ((row.name, row.width) not in goals, row.length != MAIN_LENGTH))


def has_peers(row: Row) -> bool:
    """Whether peers are timed beside a row."""
    return row.heads == PEER_HEADS and (row.name, row.width) not in WITHOUT


def peers_of(row: Row) -> list[Any]:
    """The peers that are timed beside a row."""
    from bench.throughput import peers

    found = peers.peers_of(row.name, row.mode) if has_peers(row) else []  # type: ignore[arg-type]
    return [peer for peer in found if peer.name not in SLOWER.get(row.width, ())]


def share_choices(*, bench: Callable[..., Any] | None = None) -> None:
    """Lets every Triton autotuner made from now on keep its choice on disk, and takes 15 ms for a configuration, or `bench`."""
    os.environ["FLA_CACHE_RESULTS"] = "1"
    tune_by_width()
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    real = Autotuner.__init__

    def changed(self: Any, *args: Any, **named: Any) -> None:
        real(self, *args, **named | {"do_bench": bench or partial(do_bench, warmup=3, rep=12), "cache_results": True})
        TUNERS.append(self)

    Autotuner.__init__ = changed  # type: ignore[method-assign]


class NotTuned(Exception):
    """An autotuner has no choice on disk."""


class Share:
    """Which configurations the autotuners of a compiling process run."""

    part = 0

    def bench(self, call: Callable[[], object], **_: object) -> list[float]:
        """A configuration that compiles is as good as any other."""
        call()
        return [0.0] * 3

    def take(self) -> None:
        """Lets autotuners compile a share of their configurations and launch nothing, unless a choice is on disk."""
        share_choices(bench=self.bench)
        from triton.runtime.autotuner import Autotuner

        look_up, run_one, run = Autotuner.check_disk_cache, Autotuner._bench, Autotuner.run

        def choose(tuner: Any, key: Any, configs: Any, bench: Callable[[], None]) -> bool:
            def missing() -> None:
                raise NotTuned

            try:
                return look_up(tuner, key, configs, missing)
            except NotTuned:
                bench()
                return False

        def mine(tuner: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
            if zlib.crc32(str(config).encode()) % PARTS != self.part:
                return [float("inf")] * 3
            return run_one(tuner, *args, config=config, **meta)

        def dry(tuner: Any, *args: Any, **named: Any) -> Any:
            return run(tuner, *args, **named | {"warmup": True})

        Autotuner.run = dry  # type: ignore[method-assign]
        Autotuner.check_disk_cache = choose  # type: ignore[method-assign]
        Autotuner._bench = mine  # type: ignore[method-assign]
        open_peers()


SHARE = Share()


def start_worker() -> None:
    """Prepares a compiling process."""
    SHARE.take()


def open_peers() -> None:
    """Makes peers run that refuse to, under names that say so.

    fla's gated backward declines Hopper with Triton before 3.7.1, because results were wrong; here the gate of every row
    looks at them. mamba-ssm's package imports a CUDA extension that its Triton scan does not need.
    """
    from bench.throughput import peers

    if (spec := importlib.util.find_spec("mamba_ssm")) is not None:
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["mamba_ssm"] = package
    if peers.installed(peers.FLA) is None:
        return
    for models in ("fla.layers", "fla.models"):  # if installed, fla imports them, and they a model library
        sys.modules[models] = None  # type: ignore[assignment]
    chunk_o = importlib.import_module("fla.ops.common.chunk_o")
    if not chunk_o.TRITON_ABOVE_3_7_1:
        chunk_o.TRITON_ABOVE_3_7_1 = True
        for kernel in ("scalar_decay", "gated_delta"):
            first, *rest = peers.PEERS[kernel]
            peers.PEERS[kernel] = (first._replace(name=f"{first.name} guard off"), *rest)


def compile_row(row: Row, part: int) -> float:
    """Runs a row's peers once, in the first part ours too; those without autotuners in a part of their own."""
    SHARE.part = part
    for tuner in TUNERS:
        tuner.cache.clear()
    from bench.throughput.measure import PEER_GATE_BATCH
    from bench.throughput.subjects import ATTENTION_LENGTH

    began = time.monotonic()
    theirs = [peer.function for peer in peers_of(row) if (peer.package == UNTUNED) == (part == ALONE)]
    if part == ALONE:
        run_once(row, _sizes(row), theirs)
        return time.monotonic() - began
    if part == 0:
        run_once(row, _sizes(row), [None])
    length = row.length if row.name in LENGTH_MATTERS else min(row.length, ENOUGH)
    run_once(row, {**_sizes(row), "length": length}, theirs)
    if row.name == "window" and row.mode == "train":  # torch.compile asks for every shape, and whether there are gradients
        gate = {**_sizes(row), "batch": min(row.batch, PEER_GATE_BATCH), "length": ATTENTION_LENGTH}
        for sizes in (gate, _sizes(row)):
            for mode in ("forward", "train"):
                run_once(replace(row, mode=mode), sizes, theirs)
    return time.monotonic() - began


def run_once(row: Row, sizes: dict[str, int], functions: list[Any]) -> None:
    """Runs functions, None being our own, on a problem of these sizes."""
    import torch

    from bench.throughput.draws import Draw
    from bench.throughput.kernels import OPERATIONS
    from bench.throughput.measure import one_line, timed_call
    from bench.throughput.names import KERNELS
    from bench.throughput.subjects import DTYPES

    draw = Draw(torch.device("cuda"), DTYPES[row.dtype], torch.Generator("cuda"))
    problem = OPERATIONS[row.name].problem(KERNELS[row.name].shape(**sizes), row.mode, draw)  # type: ignore[index]
    for function in functions:
        try:
            timed_call(problem, gradients=row.mode == "train", function=function)()
            torch.cuda.synchronize()
        except Exception as error:  # what does not run has its reason in the record later
            print(f"{row.text()}: {one_line(error)}", flush=True)
    del problem
    torch.cuda.empty_cache()


def _sizes(row: Row) -> dict[str, int]:
    return {"batch": row.batch, "length": row.length, "heads": row.heads, "width": row.width}


def compile_all(rows: list[Row], jobs: int, most: int = PARTS) -> None:
    """Every row that compiles something of its own, at most in so many parts; backward passes contain the forward ones."""

    def parts(row: Row) -> int:
        if row.length != MAIN_LENGTH or row.mode != "train":  # few autotuners start anew for those
            return 1
        return most if any(peer.package != "torch" for peer in peers_of(row)) else 1

    began = time.monotonic()
    tasks = [(row, part) for row in rows if row.mode != "forward" for part in range(parts(row))]
    untuned = [row for row in rows if row.mode != "forward" and any(peer.package == UNTUNED for peer in peers_of(row))]
    tasks = [*((row, ALONE) for row in untuned), *tasks]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        found = {pool.submit(compile_row, *task): task for task in tasks}
        for done in as_completed(found):
            row, part = found[done]
            said = f"{done.result():.0f} s" if done.exception() is None else repr(done.exception())
            print(f"{time.monotonic() - began:.0f} s: {row.text()} part {part}: {said}", flush=True)


def measure_all(rows: list[Row], store: Store, jobs: int) -> None:
    """Measures and stores every row: the main length, then, when what was chosen there is compiled for them, the others.

    Without `jobs` the order is that of the rows, and nothing is compiled ahead.
    """
    share_choices()
    import torch

    from bench.throughput.measure import Session

    open_peers()
    session = Session(torch.device("cuda"), with_peers=True)
    rest = [row for row in rows if row.length != MAIN_LENGTH] if jobs else []
    for row in rows:
        if rest and row is rest[0]:
            torch.cuda.empty_cache()
            compile_all(rest, jobs)
        measure_row(row, session, store)
        if session.lost:
            break


def measure_row(row: Row, session: Any, store: Store) -> None:
    """Measures and stores a row, and says in a line what came of it."""
    from bench.throughput import peers

    began, chosen = time.monotonic(), peers_of(row)
    with mock.patch.object(peers, "peers_of", lambda *_: chosen):
        record = session.measure(row)
    store.write_speed(record)
    timing, ratio, over = record.timing(), record.bound_ratio(), record.peer_ratio()
    text = record.reason if timing is None else f"{timing.median_us:.1f} us, {ratio:.2f} x bound, {over or 0:.2f} x peer"
    theirs = {peer.name: peer.reason[:80] or (peer.graph and round(peer.graph.median_us, 1)) for peer in record.peers}
    print(f"{row.text()}: {text} {theirs} ({time.monotonic() - began:.1f} s)", flush=True)


def main() -> None:
    """Compiles, or measures and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("compile", "measure"))
    parser.add_argument("store", type=Path, nargs="?", default=Path("results/runs"))
    parser.add_argument("--kernels", default="all")
    parser.add_argument("--widths")
    parser.add_argument("--lengths")
    parser.add_argument("--modes", default="train,decode")
    parser.add_argument("--jobs", type=int, default=12, help="compiling processes; none before other lengths if 0")
    parser.add_argument("--parts", type=int, default=PARTS, help="processes for a row at the main length; 1 if all is tuned")
    given = parser.parse_args()
    rows = rows_of(given)
    if given.step == "compile":
        compile_all(rows, given.jobs, given.parts)
    else:
        measure_all(rows, Store(given.store), given.jobs)


if __name__ == "__main__":
    main()
