"""Variants of the delta rule on Hopper: python -m trial.run warm | time OUT.json."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from kernels import delta, delta_coupling_triton
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.reference import linear_recurrence_reference
from tests.benchmarks.delta_rule import SEED, calls, floors_ms
from tests.benchmarks.linear_recurrence import ceilings
from trial import launch

START = time.time()
WARMED = Path(os.environ.get("TRITON_CACHE_DIR", "/tmp"), "delta_trial.json")
LIMIT = float(os.environ.get("TRIAL_SECONDS", "92"))
WIDTHS, GATES = (128, 64), ("none", "scalar")
COUPLINGS = (("ship", None), ("next", 168), ("gluon", None), ("gluon", 168))
FORWARDS = {
    128: (("ship", 64, 4), ("fused", 128, 8, 144), ("fused", 128, 8, 160), ("lean", 128, 8), ("next", 128, 8), ("lean", 32, 4)),
    64: (("ship", 32, 4), ("fused", 64, 8, 144, 8), ("fused", 64, 8, 168), ("lean", 64, 8), ("fused", 64, 4, 168, 8), ("lean", 32, 4),
         ("next", 64, 8)),
}  # fmt: skip
SHIP = {"coupling": ("ship", None), "forward": ("ship", 0, 4), "carry": ("ship", None), "backward": "ship", "plan": "ship"}


def whole(width):
    """Combinations for the operator as a whole over length."""
    couple, wide = {"coupling": ("gluon", 168)}, {"forward": ("lean", width, 8)}
    yield "shipped", SHIP
    yield "fused", SHIP | {"forward": FORWARDS[width][1], "plan": "none"}
    yield "lean", SHIP | couple | wide
    yield "lean, cut", SHIP | couple | wide | {"carry": ("next", 168), "plan": "all"}
    yield "lean, narrow", SHIP | couple | {"forward": ("lean", 32, 4), "plan": "none"}


def combinations():
    """Everything that has to be compiled and checked, the most important first: width, gate, choice."""
    every = []
    for width, gate in itertools.product(WIDTHS, GATES):
        choices = [SHIP, *(SHIP | {"forward": forward, "plan": "none"} for forward in FORWARDS[width])]
        choices += [SHIP | {"coupling": coupling, "plan": "none"} for coupling in COUPLINGS[1:]]
        choices += [dict(whole(width))["lean, cut"], SHIP | {"backward": "next"}]
        every += [(place, width, gate, choice) for place, choice in enumerate(choices)]
    return [item[1:] for item in sorted(every, key=lambda item: item[0])]


def quick_ms(call):
    """As `graph_ms`, with fewer replays."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return do_bench(graph.replay, warmup=10, rep=40, return_mode="median")


def operands(batch, length, heads, width, gate, seed=SEED):
    g = torch.Generator("cuda").manual_seed(seed)
    q, k, v, do = (torch.randn(batch, length, heads, width, device="cuda", dtype=torch.bfloat16, generator=g) for _ in range(4))
    leaves = {"q": torch.nn.functional.normalize(q, dim=-1), "k": torch.nn.functional.normalize(k, dim=-1), "v": v}
    leaves["beta_BTH"] = torch.rand(batch, length, heads, device="cuda", generator=g)
    if gate == "scalar":
        leaves["log_decay"] = -torch.rand(batch, length, heads, device="cuda", generator=g) / 8
    return leaves, do


def results(function, leaves, do, dtype=None):
    leaves = {n: (x if dtype is None else x.to(dtype)).clone().requires_grad_() for n, x in leaves.items()}
    q, k, v = (leaves.pop(n) for n in "qkv")
    o = function(q, k, v, **leaves)[0]
    grads = torch.autograd.grad(o, [q, k, v, *leaves.values()], do.to(o.dtype))
    return dict(zip(["o", "q", "k", "v", *leaves], [o.detach(), *grads], strict=True))


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


LIMITS = {"o": 5e-3, "q": 8e-3, "k": 8e-3, "v": 8e-3, "beta_BTH": 2e-2, "log_decay": 2e-2}


def check(width, gate, choice, want, case):
    """Worst error relative to its limit."""
    launch.choose(**choice)
    leaves, do = case
    with torch.no_grad():
        o = linear_recurrence(leaves["q"], leaves["k"], leaves["v"], **{n: x for n, x in leaves.items() if n not in "qkv"})[0]
    got = results(linear_recurrence, leaves, do) | {"forward only": o}
    want = want | {"forward only": want["o"]}
    return {n: error(x, want[n]) for n, x in got.items()}


def fine(errors):
    return all(e < LIMITS.get(n, 5e-3) for n, e in errors.items())


def warm_one(item):
    width, gate, choice = item
    try:
        for length in (
            (130,) if choice["plan"] == "none" and choice["forward"][0] != "fused" else (130, 1100)
        ):  # one segment, and more
            leaves, do = operands(1, length, 2, width, gate)
            with use_backend("triton"):
                launch.choose(**choice)
                results(linear_recurrence, leaves, do)
                with torch.no_grad():
                    linear_recurrence(leaves["q"], leaves["k"], leaves["v"], **{n: x for n, x in leaves.items() if n not in "qkv"})
            torch.cuda.synchronize()
        return "fine"
    except Exception:
        return traceback.format_exc()[-400:]


def warm():
    items, failed = combinations(), []
    pool = ProcessPoolExecutor(14, mp_context=get_context("spawn"), max_tasks_per_child=4)
    futures = {pool.submit(warm_one, item): item for item in items}
    try:
        for future in as_completed(futures, timeout=int(os.environ.get("TRIAL_SECONDS", 84))):
            if future.exception() or future.result() != "fine":
                failed.append(json.dumps(futures[future]))
                print(futures[future], future.exception() or future.result(), flush=True)
    except TimeoutError:
        late = [item for future, item in futures.items() if not future.done()]
        print("late", len(late), late, flush=True)
        failed += [json.dumps(item) for item in late if item[2]["forward"][0] == "fused"]
    WARMED.write_text(json.dumps(failed))
    print("warmed", len(items), time.time() - START, flush=True)
    for process in list(pool._processes.values()):
        process.kill()
    os._exit(0)


def main(out):
    rows, bad = [], set()
    record = {
        "commit": os.environ.get("BENCH_COMMIT"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "seed": SEED,
        "rows": rows,
    }

    def note(**row):
        rows.append(row)
        Path(out).write_text(json.dumps(record, indent=0) + "\n")
        print(json.dumps(row), flush=True)

    def attempt(what, function):
        if time.time() - START > LIMIT:
            return print("no time for", what)
        try:
            return function()
        except Exception:
            print(what, traceback.format_exc()[-600:], flush=True)
            if "CUDA error" in traceback.format_exc():
                os._exit(3)

    cases = {}
    for width, gate in itertools.product(WIDTHS, GATES):
        case = operands(1, 2150, 2, width, gate)
        cases[width, gate] = case, results(linear_recurrence_reference, *case, dtype=torch.float64)
    failed = json.loads(WARMED.read_text()) if WARMED.exists() else []
    if os.environ.get("TRIAL_NO_FUSED"):
        failed += [json.dumps(item) for item in combinations() if item[2]["forward"][0] == "fused"]
    for width, gate, choice in sorted(combinations(), key=lambda item: item[2]["forward"][0] == "fused"):
        if json.dumps([width, gate, choice]) in failed:
            print("failed before", width, gate, choice)
            continue
        case, want = cases[width, gate]

        def one():
            errors = check(width, gate, choice, want, case)
            if not fine(errors):
                bad.add(json.dumps([width, gate, choice]))
            note(check=[width, gate, choice], fine=fine(errors), errors={n: float(f"{e:.2e}") for n, e in errors.items()})

        attempt("check", one)
    record["copy_bytes_per_s"], record["product_flop_per_s"] = ceilings()

    def parts(width, gate):
        leaves, do = operands(8, 2048, 16, width, gate)
        q, k, v, beta, log_decay = (leaves.get(n) for n in ("q", "k", "v", "beta_BTH", "log_decay"))
        for coupling in COUPLINGS:
            launch.choose(**SHIP | {"coupling": coupling})
            ms = quick_ms(lambda: only_coupling(q, k, v, beta, log_decay))
            note(part="coupling", width=width, gate=gate, variant=coupling, us=round(1e3 * ms, 1))
        for forward in sorted(FORWARDS[width], key=lambda f: f[0] == "fused"):
            choice = SHIP | {"forward": forward, "plan": "none"}
            if json.dumps([width, gate, choice]) in [*failed, *bad]:
                continue
            launch.choose(**choice)
            _, _, kept = delta.forward(q, k, v, beta, log_decay, None, return_state=False, keep=True)
            launch.V.gate = log_decay
            for keep in (False, True):
                o, last = torch.empty_like(v), v.new_empty(0, dtype=torch.float32)
                ms = quick_ms(
                    lambda: launch.run_forward(
                        q, k, v, beta, kept, None, o, last, None, gated=gate != "none", return_state=False, keep=keep
                    )
                )
                note(part="forward", width=width, gate=gate, variant=forward, keep=keep, us=round(1e3 * ms, 1))
        for backward in ("ship", "next"):
            launch.choose(**SHIP | {"backward": backward})
            _, _, kept = delta.forward(q, k, v, beta, log_decay, None, return_state=False, keep=True)
            ms = quick_ms(lambda: delta.backward(q, k, beta, log_decay, None, kept, do, None, gate_grad=log_decay is not None))
            note(part="backward", width=width, gate=gate, variant=backward, us=round(1e3 * ms, 1))

    for width, gate in itertools.product(WIDTHS, GATES):
        attempt((width, gate), lambda: parts(width, gate))

    def over_length(width, gate, batch, length):
        rates = record["copy_bytes_per_s"], record["product_flop_per_s"]
        floor = floors_ms((batch, length, 16, width), gate, rates)
        for name, choice in whole(width):
            if length <= 2048 and "," in name:
                continue
            if name == "fused" and json.dumps([width, gate, choice]) in [*failed, *bad]:
                continue
            launch.choose(**choice)
            forward, both = calls((batch, length, 16, width), gate)
            times = attempt(name, lambda: (quick_ms(forward), quick_ms(both)))
            if times:
                note(
                    whole=name,
                    shape=[batch, length, 16, width],
                    gate=gate,
                    ms=[round(x, 4) for x in times],
                    x=[round(a / b, 2) for a, b in zip(times, floor, strict=True)],
                )

    for (batch, length), gate, width in itertools.product(((8, 2048), (2, 8192), (1, 32768), (32, 512)), GATES, WIDTHS):
        attempt((length, gate, width), lambda: over_length(width, gate, batch, length))
    print("\n".join(json.dumps(r) for r in rows if "part" in r or "whole" in r))
    print("red:", len(bad), *bad, sep="\n")


def only_coupling(q, k, v, beta, log_decay):
    """The coupling kernel as `delta.forward` launches it."""
    from kernels.walk import _gate, _gate_kind, _precision, _rows, _triton_dtype, padded

    batch, length, heads, v_dim = v.shape
    dot = torch.bfloat16
    kept = delta.kept_like(q, k, v, log_decay, keep=False)
    chunks = kept.couplings.shape[2]
    _, strides, unit = _rows(q, k, v)
    gate, gate_strides, every = _gate(log_decay, batch, v)
    delta_coupling_triton.coupling_kernel[(batch * heads * chunks,)](
        k, beta, gate, kept.couplings, kept.decays, *strides[3:6], *gate_strides, length, chunks, heads, 1, every,
        K=k.shape[3], BK=padded(k.shape[3]), UNIT=unit, C=64, DOT=_triton_dtype(dot), PRECISION=_precision(dot),
        GATE=_gate_kind(log_decay), MERGE=_triton_dtype(torch.float16), num_warps=1,
    )  # fmt: skip


if __name__ == "__main__":
    with use_backend("triton"):
        warm() if sys.argv[1] == "warm" else main(sys.argv[2])
