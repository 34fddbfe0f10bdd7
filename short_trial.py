"""Trial: short rows tile by tile beside the walks that shipped.

python3 short_trial.py warm OUT PART PARTS    compiles, and compares with fp64
python3 short_trial.py time OUT
"""

from __future__ import annotations

import glob
import json
import os
import sys
import time
import traceback

import torch

from bench.throughput import clock
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.walks import short_rows, walk
from kernels.walks.short_rows import Config
from kernels.taylor_features import taylor_launch, taylor_short
from kernels.taylor_features.taylor_short import Config as T

clock.WARM_UP_MS, clock.MEASURED_MS = 3, 20
LONGEST = {128: 4096}
SHIPPED = {}
# batch, length, groups, heads, K, V
SMALL, SSD = (64, 256, 2, 2, 64, 64), (64, 256, 1, 2, 128, 64)
FLEETS = [(1024, t, 2, 2, 64, 64) for t in (256, 128, 64)] + [(1024, 256, 1, 1, 64, 64)]
WIDE = [(64, 256, 2, 2, 128, 128), (1024, 256, 1, 1, 128, 128), (1024, 128, 1, 1, 128, 128), (1024, 64, 1, 1, 128, 128)]
LONGER = [(64, 512, 2, 2, 64, 64), (32, 512, 16, 16, 64, 64)]
TINY = (1024, 256, 1, 4, 16, 64)
CLASSES = {"narrow": [SMALL], "shared": [SSD], "tiny": [TINY], "wide": [WIDE[0]]}
FORWARD = {  # configurations, and how many keys at once where pairs are multiplied instead of states
    "narrow": [(Config(64, 64, 4, 1), 0), (Config(64, 64, 4, 2), 0), (Config(64, 64, 4, 3), 0), (Config(64, 64, 8, 1), 0), (Config(128, 64, 8, 1, None, 128), 0), (Config(64, 64, 4, 1, None, 128), 0), (Config(64, 64, 4, 1, None, 256), 0),
               (Config(64, 64, 4, 1, 128), 64), (Config(64, 64, 4, 2, 128), 64), (Config(64, 64, 4, 1), 128), (Config(64, 64, 8, 1), 256), (Config(64, 64, 8, 1, 128), 128), (Config(128, 64, 8, 1, 128), 64)],
    "shared": [(Config(64, 64, 4, 1), 0), (Config(64, 64, 4, 2), 0), (Config(64, 64, 8, 1), 0), (Config(128, 64, 8, 1), 0), (Config(64, 64, 4, 1, 128), 64), (Config(64, 64, 4, 2, 168), 64), (Config(64, 64, 8, 1), 128), (Config(128, 64, 8, 1, 128), 64)],
    "wide": [(Config(64, 64, 4, 2), 0), (Config(64, 128, 8, 1), 0), (Config(64, 128, 8, 2), 0), (Config(64, 128, 8, 1), 64)],
    "tiny": [(Config(64, 64, 4, 1), 0), (Config(64, 64, 4, 2), 0), (Config(64, 64, 4, 1, 128), 64)],
}
BACKWARD = {
    "tiny": [Config(64, 64, 4, 1), Config(64, 64, 8, 1), Config(64, 0, 4, 1)],
    "narrow": [Config(64, 64, 4, 1), Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(64, 64, 4, 1, 168), Config(64, 64, 4, 1, 128), Config(64, 64, 8, 1), Config(128, 64, 8, 1, None, 128), Config(64, 64, 4, 1, None, 128)],
    "shared": [Config(64, 64, 8, 1), Config(64, 64, 8, 2), Config(64, 64, 4, 1), Config(64, 0, 8, 1), Config(64, 0, 4, 1), Config(64, 0, 8, 1, 128)],
    "wide": [Config(64, 128, 8, 1), Config(64, 128, 8, 2)],
}
GATES = {"narrow": ("none", "constant", "scalar"), "shared": ("scalar", "none"), "wide": ("none", "scalar"), "tiny": ("scalar",)}


TAYLOR_SHAPES = [((64, 256, 2), False), ((64, 256, 2), True), ((1024, 256, 2), True), ((1024, 128, 2), True), ((1024, 64, 2), True), ((64, 512, 2), True)]
TAYLOR = {
    "forward": [T(64, 64, 4, 2, 128), T(64, 64, 4, 1, 128), T(64, 128, 4, 1), T(64, 256, 8, 1), T(128, 128, 8, 1), T(128, 64, 8, 2)],
    "backward": [T(64, 64, 4, 1), T(64, 64, 4, 2), T(64, 64, 4, 1, 128), T(64, 128, 8, 1), T(128, 64, 8, 1), T(128, 128, 8, 1)],
}


def taylor_calls(shape, norm, forward, backward, seed=0):
    """Inputs, forward and backward of Taylor attention: what shipped without configurations."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    q, k, v, dy = (torch.randn(*shape, w, device="cuda", generator=generator).bfloat16() for w in (16, 16, 64, 64))
    if forward is None:
        ahead = lambda: taylor_launch.forward(q, k, v, None, None, norm, 1e-6, False)
        y, scale, entering, entering_norm, *_ = ahead()
        back = lambda: taylor_launch.backward(q, k, v, y, scale, entering, entering_norm, dy, None, None, norm, False)[:3]
    else:
        ahead = lambda: set_taylor(forward, backward) or taylor_short.forward(q, k, v, norm=norm, eps=1e-6)
        y, scale = ahead()
        back = lambda: set_taylor(forward, backward) or taylor_short.backward(q, k, v, y, scale, dy, norm=norm)
    return (q, k, v, dy), ahead, back


def set_taylor(forward, backward):
    taylor_short.FORWARD, taylor_short.BACKWARD = forward, backward


def taylor_errors(shape, norm, forward, backward):
    (q, k, v, dy), ahead, back = taylor_calls(shape, norm, forward, backward)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    s = torch.einsum("bihk,bjhk->bhij", *leaves[:2]) / 4
    p = (1 + s + s * s / 2).tril()
    y = torch.einsum("bhij,bjhv->bihv", p / (p.sum(-1, keepdim=True) + 1e-6) if norm else p, leaves[2])
    want = (y.detach(), *torch.autograd.grad(y, leaves, dy.double()))
    return {n: float((a.double() - b).norm() / b.norm()) for n, a, b in zip(("o", "dq", "dk", "dv"), (ahead()[0], *back()), want)}


def class_of(shape):
    return "tiny" if shape[4] == 16 else "shared" if shape[2] < shape[3] else "narrow" if shape[4] == 64 else "wide"


def draw(shape, gate, seed=0):
    batch, length, groups, heads, k, v = shape
    generator = torch.Generator(device="cuda").manual_seed(seed)
    normal = lambda *size: torch.randn(*size, device="cuda", generator=generator)
    rates = normal(batch, length, heads).abs() / 8
    decay = {"none": None, "constant": -rates[:1, 0], "scalar": -rates, "strong": -10 * torch.rand(batch, length, heads, device="cuda", generator=generator)}[gate]
    return walk.Inputs(normal(batch, length, groups, k).bfloat16(), (normal(batch, length, groups, k) * k**-0.5).bfloat16(), normal(batch, length, heads, v).bfloat16(), decay, None, None), normal(batch, length, heads, v).bfloat16()


def set_to(forward, backward):
    short_rows.LONGEST = SHIPPED if forward is None else LONGEST
    if forward is not None:
        short_rows.JOINT = backward.tile > 0
        short_rows.PAIRS = forward[1]
        short_rows.FORWARD, short_rows.BACKWARD = {128: forward[0]}, {128: backward}


def out(folder, name):
    handle = open(os.path.join(folder, name), "a")

    def write(**row):
        handle.write(json.dumps(row) + "\n")
        handle.flush()

    return write


def errors(shape, gate):
    """Relative errors of the outputs and gradients against the chunked form in fp64."""
    inputs, do = draw(shape, gate)
    got = {"o": walk.forward(inputs, return_state=False)}
    entering, got["o"] = got["o"][2], got["o"][0]
    names = ("q", "k", "v", "log_decay")
    of_gate = gate in ("scalar", "strong")
    grads = walk.backward(inputs, entering, walk.Gradients(do, None, None), gate_grad=of_gate)
    got |= {f"d{n}": x for n, x in zip(names, grads)}
    leaves = {n: getattr(inputs, n).double().requires_grad_() for n in names if getattr(inputs, n) is not None}
    decay = leaves.get("log_decay")
    with use_backend("chunked"):
        o = linear_recurrence(leaves["q"], leaves["k"], leaves["v"], log_decay=None if decay is None else decay[0] if decay.ndim == 2 else decay)[0]
    want = {"o": o.detach(), **{f"d{n}": g for n, g in zip(leaves, torch.autograd.grad(o, list(leaves.values()), do.double()))}}
    if not of_gate:
        want.pop("dlog_decay", None)
    return {n: float((got[n].double() - want[n]).norm() / want[n].norm()) for n in want}


def right(found):
    return all(e <= (2e-2 if n == "dlog_decay" else 8e-3 if n != "o" else 5e-3) for n, e in found.items())


def variants(kind):
    """Pairs of configurations that between them hold all."""
    f, b = FORWARD[kind], BACKWARD[kind]
    return [(f[i % len(f)], b[i % len(b)]) for i in range(max(len(f), len(b)))]


def warm(folder, part, parts):
    write = out(folder, f"warm_{part}.jsonl")
    tasks = []
    for kind, (shape,) in CLASSES.items():
        for gates in (["scalar", "strong"], *([g] for g in GATES[kind] if g != "scalar")):
            for pair in [(None, None), *variants(kind)]:
                lengths = (256, 250, *((512,) if pair[0] is None else ()), *((64, 128) if "constant" not in gates and kind not in ("shared", "tiny") else ()))
                tasks.append([((n, length, *shape[2:]), gate, pair) for length in lengths for gate in gates for n in ((64,) if pair[0] is None else (4,))])
    wide = [group for group in tasks if group[0][0][4] == 128 and group[0][0][2] == group[0][0][3]]
    tasks = [group for group in tasks if group not in wide]
    pairs = list(zip(TAYLOR["forward"], TAYLOR["backward"]))
    for (forward, backward), norm in [((None, None), n) for n in (False, True)] + [(p, False) for p in pairs] + [(p, True) for p in pairs[:5]]:
        tasks.append([((4, length, 2), norm, (forward, backward)) for length in (256, 250)])
    tasks += wide
    for shape, gate, pair in [one for group in tasks[part::parts] for one in group]:
        if len(shape) == 3:
            try:
                found = taylor_errors(shape, gate, *pair)
                write(step="fp64", name="taylor", shape=shape, norm=gate, forward=pair[0], backward=pair[1], errors=found, right=right(found))
            except Exception:
                write(step="failed", name="taylor", shape=shape, norm=gate, forward=pair[0], backward=pair[1], why=traceback.format_exc()[-400:])
            continue
        try:
            set_to(*pair)
            found = errors(shape, gate)
            write(step="fp64", shape=shape, gate=gate, forward=pair[0], backward=pair[1], errors=found, right=right(found))
        except Exception:
            write(step="failed", shape=shape, gate=gate, forward=pair[0], backward=pair[1], why=traceback.format_exc()[-400:])


def calls(shape, gate):
    inputs, do = draw(shape, gate)
    grad = gate == "scalar"
    entering = walk.forward(inputs, return_state=False)[2]
    fwd = lambda: walk.forward(inputs, return_state=False)
    back = lambda: walk.backward(inputs, entering, walk.Gradients(do, None, None), gate_grad=grad)
    return fwd, back


def timing(folder):
    began = time.time()
    write = out(folder, "times.jsonl")
    best: dict = {}
    slow: set = set()

    def timed(shape, gate, which, config, call):
        try:
            t = clock.replays(call)
        except Exception:
            write(step="failed", shape=shape, gate=gate, which=which, config=config, why=traceback.format_exc()[-300:])
            return None
        write(step="time", shape=shape, gate=gate, which=which, config=config, us=t.median_us, low=t.low_us, high=t.high_us, n=t.n, at=time.time() - began)
        return t.median_us

    def both(shape, gate, config):
        fwd, back = calls(shape, gate)
        timed(shape, gate, "both", config, lambda: (fwd(), back()))

    def sweep(shape, gate, prune):
        kind = class_of(shape)
        set_to(None, None)
        fwd, back = calls(shape, gate)
        rows = {("forward", None): timed(shape, gate, "forward", None, fwd), ("backward", None): timed(shape, gate, "backward", None, back)}
        both(shape, gate, None)
        for which, configs in (("forward", FORWARD[kind]), ("backward", BACKWARD[kind])):
            for config in configs:
                if prune and (kind, gate, which, config) in slow:
                    continue
                set_to(config, BACKWARD[kind][0]) if which == "forward" else set_to(FORWARD[kind][0], config)
                try:
                    call = calls(shape, gate)[which == "backward"]
                except Exception:
                    write(step="failed", shape=shape, gate=gate, which=which, config=config, why=traceback.format_exc()[-300:])
                    continue
                rows[which, config] = timed(shape, gate, which, config, call)
            mine = {c: t for (w, c), t in rows.items() if w == which and c is not None and t is not None}
            if mine:
                first = min(mine.values())
                best[shape, gate, which] = min(mine, key=mine.get)
                if not prune:
                    slow.update((kind, gate, which, c) for c, t in mine.items() if t > 1.2 * first)
        if (shape, gate, "backward") in best and (shape, gate, "forward") in best:
            pair = best[shape, gate, "forward"], best[shape, gate, "backward"]
            set_to(*pair)
            both(shape, gate, pair)
        short = lambda w: (rows[w, None], min([t for (x, c), t in rows.items() if x == w and c is not None and t is not None], default=None), best.get((shape, gate, w)))
        print(shape, gate, "forward shipped/new", *short("forward"), "backward", *short("backward"), f"at {time.time() - began:.0f} s", flush=True)

    def taylor(shape, norm, prune):
        rows = {}
        for which, at in (("forward", 1), ("backward", 2)):
            for config in [None, *TAYLOR[which]]:
                if prune and (which, config) in slow:
                    continue
                pair = (None, None) if config is None else (config, TAYLOR["backward"][0]) if at == 1 else (TAYLOR["forward"][0], config)
                try:
                    rows[which, config] = timed(("taylor", *shape), norm, which, config, taylor_calls(shape, norm, *pair)[at])
                except Exception:
                    write(step="failed", shape=("taylor", *shape), gate=norm, which=which, config=config, why=traceback.format_exc()[-300:])
            mine = {c: t for (w, c), t in rows.items() if w == which and c is not None and t is not None}
            best["taylor", which] = min(mine, key=mine.get)
            if not prune:
                slow.update((which, c) for c, t in mine.items() if t > 1.2 * min(mine.values()))
        for pair in ((None, None), (best["taylor", "forward"], best["taylor", "backward"])):
            _, f, b = taylor_calls(shape, norm, *pair)
            timed(("taylor", *shape), norm, "both", pair, lambda: (f(), b()))
        print("taylor", shape, norm, *((w, rows[w, None], rows[w, best["taylor", w]], best["taylor", w]) for w in ("forward", "backward")), f"at {time.time() - began:.0f} s", flush=True)

    def eager(shape, gate):
        inputs, do = draw(shape, gate)
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        decay = inputs.log_decay
        if gate == "scalar":
            decay = decay.clone().requires_grad_()
        named = {"log_decay": decay[0] if gate == "constant" else decay}
        wanted = [*leaves, *([decay] if gate == "scalar" else [])]

        def run():
            return linear_recurrence(*leaves, **named)[0]

        def train():
            return torch.autograd.grad(run(), wanted, do)

        for name, pair in (("shipped", (None, None)), ("new", (best[shape, gate, "forward"], best[shape, gate, "backward"]))):
            from kernels.walks import recurrence_op
            set_to(*pair)
            for o in (recurrence_op.linear_recurrence, recurrence_op.linear_recurrence_backward):
                o.repeated.plans.clear()
            f, b = clock.eager(run, torch.device("cuda")), clock.eager(train, torch.device("cuda"))
            write(step="eager", shape=shape, gate=gate, which=name, forward=f.median_us, both=b.median_us)
            print("eager", name, gate, f.median_us, b.median_us, flush=True)

    for gate in ("scalar", "none", "constant"):
        sweep(SMALL, gate, False)
    for gate in ("scalar", "none"):
        sweep(SSD, gate, False)
    for gate in ("scalar", "none", "constant"):
        eager(SMALL, gate)
    for (shape, norm), prune in zip(TAYLOR_SHAPES[:2], (False, True)):
        taylor(shape, norm, prune)
    for shape in FLEETS:
        for gate in ("scalar", "none"):
            sweep(shape, gate, True)
    for shape, norm in TAYLOR_SHAPES[2:]:
        taylor(shape, norm, True)
    sweep((SSD[0], SSD[1], 1, 4, *SSD[4:]), "scalar", True)
    sweep(TINY, "scalar", False)
    for gate in ("none", "scalar"):
        sweep(WIDE[0], gate, False)
    for shape in LONGER[:1] + WIDE[1:] + LONGER[1:]:
        for gate in ("scalar", "none"):
            sweep(shape, gate, True)


if __name__ == "__main__":
    if sys.argv[1] == "warm":
        warm(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        timing(sys.argv[2])
