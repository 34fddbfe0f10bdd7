"""Trial: segments of the Hopper walks, heads that share keys on them, the decays' gradient without exchanges, beside what shipped.

`kernels_shipped` is a copy of `kernels` of commit 2018cb1 under that name, with operators of another namespace.


python3 segments_trial.py warm OUT PART PARTS    compiles, and compares with fp64
python3 segments_trial.py time OUT
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import types

import torch

import kernels._replay
import kernels_shipped._replay
from bench.throughput import clock
from kernels.walks import walk_grouped, walk_hopper_launch as L
from kernels.dispatch import use_backend
from kernels.operands import _gate_kind
from kernels.recurrence import linear_recurrence
from kernels.walks.walk_decays import gate_of
from kernels_shipped.dispatch import use_backend as use_shipped
from kernels_shipped.recurrence import linear_recurrence as shipped_recurrence

clock.WARM_UP_MS, clock.MEASURED_MS = 4, 22
HEADS = 16
GATES = ("none", "constant", "scalar")
SHAPES = {"T2048": (8, 2048), "T8192": (2, 8192), "T32768": (1, 32768), "ragged": (2, 2000)}
SETTINGS = {L: ("SUMS", "PROGRAMS", "FORWARD", "SHARED", "KEPT", "LATE", "SORTED", "segment_sums", "suits"), walk_grouped: ("QUERIES", "KEYS")}
DEFAULT = [(module, name, getattr(module, name)) for module, names in SETTINGS.items() for name in names]


def plain_sums(b, c, kept, inputs, *, reverse):
    """The sums over segments as the plain walks make them."""
    from kernels.operands import _rows, _triton_dtype, padded
    from kernels.walks.walk_config import segment_config, tile_of
    from kernels.walks.walk_forward_triton import segment_kernel

    pieces = L.share_out(inputs)
    if pieces.number == 1:
        return
    (batch, length, heads, v_dim), k_dim, gate = c.shape, b.shape[3], gate_of(inputs.log_decay, c)
    kind, config = _gate_kind(inputs.log_decay), segment_config(k_dim, c.dtype)
    tile = tile_of(config, v_dim, c.dtype)
    _, strides, unit = _rows(b, c)
    segment_kernel[(batch * (pieces.number - 1) * heads * -(-v_dim // tile),)](
        b, c, gate, kept[1], kept[2],
        *strides, length, heads, heads // b.shape[2], batch // gate.shape[0] if kind == 1 else 1, pieces.number, pieces.length,
        K=k_dim, V=v_dim, BK=padded(k_dim), BV=tile, UNIT=unit, C=L.CHUNK, GATE=kind, REVERSE=reverse,
        DOT=_triton_dtype(c.dtype), PRECISION=None, STAGES=config.stages, num_warps=config.warps,
    )


def suits_narrow(inputs):
    own = inputs.k.shape[2] == inputs.v.shape[2]
    least, most = sorted((inputs.k.shape[3], inputs.v.shape[3]))
    return own and L._fits(inputs) and (least > 64 or most <= 64)


W, N = L.WIDTH, L.NARROW
VARIANTS = {
    "shipped": None,
    "new": {},
    "plain sums": {"segment_sums": plain_sums},
    "sums of 64": {"SUMS": {N: L.States(64, 1, 3), W: L.States(64, 1, 4)}},
    "256 programs": {"PROGRAMS": {N: 256, W: 128}, "FORWARD": {N: L.Config(1, 3), W: L.Config(2, 3)}},
    "late": {"LATE": True},
    "keys first": {"SORTED": True},
    "late, keys first": {"LATE": True, "SORTED": True},
    "narrow gradients, keys first": {"SORTED": True, "suits": suits_narrow},
    "one group": {"SHARED": L.Config(1, 3)},
    "one group, two programs": {"SHARED": L.Config(1, 2), "PROGRAMS": {N: 256, W: 256}},
    "kept by one group": {"KEPT": L.States(64, 1, 3)},
    "keys by 8 warps": {"KEYS": {"num_warps": 8, "STAGES": 2}},
    "queries by 8 warps": {"QUERIES": {"num_warps": 8, "STAGES": 2}},
}


def use(name):
    """The function of a variant."""
    kernels._replay.forget()
    kernels_shipped._replay.forget()
    for module, key, x in DEFAULT:
        setattr(module, key, x)
    if VARIANTS[name] is None:
        return shipped_recurrence, use_shipped
    for key, x in VARIANTS[name].items():
        setattr(walk_grouped if key in SETTINGS[walk_grouped] else L, key, x)
    return linear_recurrence, use_backend


def variants_of(width, gate, shape, shared):
    """Which of them differ from the first two."""
    if shared:
        return ["shipped", "new", "one group", "one group, two programs", "kept by one group", "keys by 8 warps", "queries by 8 warps"]
    found = ["shipped", "new"]
    if shape != "T2048":
        found += ["256 programs"] if width == 64 else []
        found += [] if gate == "constant" else ["plain sums"] if width == 64 else ["plain sums", "sums of 64"]
    elif width == 64 and gate == "scalar":
        found += ["256 programs"]
    if width == 64 and gate != "scalar" and shape == "T2048":
        found += ["narrow gradients, keys first"]
    elif gate != "constant":
        found += ["keys first"]
    if gate == "scalar" and shape in ("T2048", "T8192"):
        found += ["late", "late, keys first"]
    return found


def draw(batch, length, heads, groups, k_dim, v_dim, gate, *, state=False, strong=False):
    g = torch.Generator("cuda").manual_seed(length + k_dim)

    def normal(*size):
        return torch.randn(*size, generator=g, device="cuda")

    x = {
        "q": normal(batch, length, groups, k_dim).bfloat16(),
        "k": (normal(batch, length, groups, k_dim) * k_dim**-0.5).bfloat16(),
        "v": normal(batch, length, heads, v_dim).bfloat16(),
    }
    if gate == "constant":
        x["log_decay"] = torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, device="cuda"))))
    if gate == "scalar":
        x["log_decay"] = (-10 if strong else -5) * torch.rand(batch, length, heads, generator=g, device="cuda").pow(1 if strong else 4)
    if state:
        x["state_BHKV"] = normal(batch, heads, k_dim, v_dim)
    return x


def learned(x, gate):
    return [name for name in x if not (name == "log_decay" and gate == "constant")]


def both_of(function, x, gate, *, state=False):
    own = {name: t.detach().requires_grad_(name in learned(x, gate)) for name, t in x.items()}
    rest = {name: t for name, t in own.items() if name not in ("q", "k", "v")}
    with torch.no_grad():
        o, final = function(own["q"], own["k"], own["v"], **rest)
    g = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, device="cuda", dtype=t.dtype if t.dtype != torch.float64 else torch.float32).to(t.dtype)
               for t in ((o, final) if state else (o,))]
    wanted = [own[name] for name in learned(x, gate)]

    def both():
        o, final = function(own["q"], own["k"], own["v"], **rest)
        outputs = [o, final] if state else [o]
        return [*[t.detach() for t in outputs], *torch.autograd.grad(outputs, wanted, weights)]

    @torch.no_grad()
    def forward():
        return function(own["q"], own["k"], own["v"], **rest)[0]

    return forward, both


def errors(got, want):
    found = []
    for a, b in zip(got, want, strict=True):
        bad = not bool(torch.isfinite(a).all())
        found.append(float("nan") if bad else float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt().clamp_min(1e-9)))
    return found


def check_fp64(name, width, gate, shape, *, strong, shared):
    batch, length, heads = shape
    k_dim, v_dim, groups = (128, 64, 1) if shared else (width, width, heads)
    x = draw(batch, length, heads, groups, k_dim, v_dim, gate, state=True, strong=strong)
    names = ["o", "final", *learned(x, gate)]
    function, backend = use(name)
    with backend("triton"):
        got = both_of(function, x, gate, state=True)[1]()
        same = True
        for _ in range(5):
            same &= all(torch.equal(a, b) for a, b in zip(got, both_of(function, x, gate, state=True)[1](), strict=True))
    with use_backend("chunked"):
        want = both_of(linear_recurrence, {n: t.double() for n, t in x.items()}, gate, state=True)[1]()
    found = dict(zip(names, errors(got, want), strict=True))
    right = same and all(e <= (2e-2 if n == "log_decay" else 5e-3) for n, e in found.items())
    return {"right": right, "repeats": same, "errors": found}


def tasks():
    """Every kernel once: what is compiled, and compared."""
    for width in (128, 64):
        for gate in ("scalar", "constant", "none"):
            for shape in ("T2048", "T8192"):
                for name in variants_of(width, gate, shape, False):
                    yield name, width, gate, shape, False
    for shape in ("T2048", "T8192"):
        for name in variants_of(128, "scalar", shape, True):
            yield name, 128, "scalar", shape, True


def say(path, record):
    with open(path, "a") as f:
        f.write(json.dumps(record) + "\n")


def no_others():
    for replay in (kernels._replay, kernels_shipped._replay):
        for one in replay.functions():
            one.others = lambda *_: ()


def run_once(name, width, gate, shape, shared):
    batch, length = SHAPES[shape]
    dims = (1, 128, 64) if shared else (HEADS, width, width)
    x = draw(batch, length, HEADS, *dims, gate)
    function, backend = use(name)
    with backend("triton"):
        forward, both = both_of(function, x, gate)
        forward()
        both()
    torch.cuda.synchronize()


def warm(out, part, parts):
    no_others()
    mine = list(tasks())[part::parts]
    for task in mine:
        began = time.time()
        try:
            run_once(*task)
            record = {"task": task, "seconds": round(time.time() - began, 1)}
        except Exception:
            record = {"task": task, "failed": traceback.format_exc()[-1500:]}
        say(f"{out}/warm_{part}.jsonl", record)
    for name, width, gate, shape, shared in mine:
        if name == "shipped":
            continue
        small = (8, 577 if width == 128 else 1100, 16) if shape == "T2048" else (1, 1601, 4 if shared else 2)
        for strong in (False, True) if gate == "scalar" else (False,):
            try:
                found = check_fp64(name, width, gate, small, strong=strong, shared=shared)
            except Exception:
                found = {"right": False, "failed": traceback.format_exc()[-1500:]}
            say(f"{out}/warm_{part}.jsonl", {"fp64": [name, width, gate, small, strong, shared], **found})


def measure(out, began, limit):
    no_others()
    rows = [(s, w, g, False) for s, w, g in (
        *(("T2048", w, "scalar") for w in (128, 64)),
        *(("T8192", w, g) for w in (128, 64) for g in GATES),
    )]
    rows += [("T2048", 128, "scalar", True), ("T8192", 128, "scalar", True)]
    rows += [("T32768", w, g, False) for w in (128, 64) for g in GATES]
    rows += [("T2048", w, g, False) for w in (128, 64) for g in ("none", "constant")]
    rows += [("ragged", w, g, False) for w in (128, 64) for g in GATES]
    for shape, width, gate, shared in rows:
        if time.time() - began > limit:
            say(f"{out}/segments.jsonl", {"cut off before": [shape, width, gate, shared]})
            break
        batch, length = SHAPES[shape]
        dims = (1, 128, 64) if shared else (HEADS, width, width)
        x = draw(batch, length, HEADS, *dims, gate)
        line, reference = [], None
        for name in variants_of(width, gate, shape, shared):
            record = {"shape": shape, "batch": batch, "length": length, "width": width, "gate": gate, "shared": shared, "variant": name}
            try:
                function, backend = use(name)
                with backend("triton"):
                    forward, both = both_of(function, x, gate)
                    got = both()
                    repeats = sum(all(bool(torch.equal(a, b)) for a, b in zip(got, both(), strict=True)) for _ in range(50))
                    record["equal_repeats"] = repeats
                    if name == "shipped":
                        reference = got
                        record["finite"] = all(bool(torch.isfinite(t).all()) for t in got)
                    else:
                        record["from_shipped"] = dict(zip(["o", *learned(x, gate)], errors(got, reference), strict=True))
                    del got
                    right = repeats == 50 and all(e <= (2e-2 if n == "log_decay" else 7e-3) for n, e in record.get("from_shipped", {}).items())
                    record["right"] = right
                    record["forward_us"] = clock.replays(forward).model_dump()
                    record["both_us"] = clock.replays(both).model_dump()
                line.append(f"{name}{'' if right else ' WRONG'} {record['forward_us']['median_us']:.1f} / {record['both_us']['median_us']:.1f}")
            except Exception:
                record["failed"] = traceback.format_exc()[-1500:]
                line.append(f"{name} FAILED")
            say(f"{out}/segments.jsonl", record)
        print(f"{time.time() - began:5.1f}s {shape} {'ssd' if shared else width} {gate}: " + "; ".join(line), flush=True)
        del x, reference


if __name__ == "__main__":
    begin = time.time()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if sys.argv[1] == "warm":
        warm(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        import triton

        say(f"{sys.argv[2]}/segments.jsonl", {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "ptxas": os.environ.get("TRITON_PTXAS_PATH"), "commit": os.environ.get("BENCH_COMMIT"), "seeds": "length + width", "heads": HEADS})
        try:
            copy = clock.ceilings(torch.device("cuda"))
            say(f"{sys.argv[2]}/segments.jsonl", {"ceilings": copy._asdict()})
        except Exception:
            traceback.print_exc()
        measure(sys.argv[2], begin, 72)
