"""Trial: gradients of heads that share keys in Gluon, queries beside the walk of states, lines kept; constant decays made once.

`kernels_shipped` is a copy of `kernels` of main under that name, with operators of another namespace; `kernels_clean` what would ship.

python3 ssd_trial.py warm OUT PART PARTS    compiles, and compares with fp64
python3 ssd_trial.py time OUT SECONDS
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback

import torch

import kernels._replay
import kernels_clean._replay
import kernels_shipped._replay
from bench.throughput import clock
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence
from kernels.walks import walk_hopper_plan as plan
from kernels_clean.dispatch import use_backend as use_clean
from kernels_clean.recurrence import linear_recurrence as clean_recurrence
from kernels_shipped.dispatch import use_backend as use_shipped
from kernels_shipped.recurrence import linear_recurrence as shipped_recurrence

HEADS = 16
SHAPES = {"T256": (64, 256), "T512": (32, 512), "T2048": (8, 2048), "T8192": (2, 8192), "T32768": (1, 32768)}
DEFAULT = {"FORWARD": dict(plan.FORWARD), "KEPT": plan.KEPT, "SHARED": plan.SHARED}
FIVE = {"FORWARD": {64: plan.Config(1, 5), 128: plan.FORWARD[128]}}
SIX = {"FORWARD": {64: plan.Config(1, 6), 128: plan.FORWARD[128]}}
VARIANTS = {
    "shipped": None,
    "clean": None,
    "lines": (0, {}),
    "gluon": (1, {}),
    "gluon beside": (3, {}),
    "gluon after": (5, {}),
    "gluon beside after": (7, {}),
    "beside after one group": (7, {"KEPT": plan.States(64, 1, 3)}),
    "beside after two stages": (7, {"KEPT": plan.States(64, 2, 2)}),
    "beside after ahead": (39, {}),
    "four stages": (7, {"SHARED": plan.Config(1, 4)}),
    "after": (4, {}),
    "after late": (68, {}),
    "beside after late": (71, {}),
    "after late five": (68, FIVE),
    "after ahead": (36, {}),
    "beside after late ahead": (103, {}),
    "ahead": (32, {}),
    "after late ahead": (100, {}),
    "pairs": (8, {}),
    "pairs keep after late": (92, {}),
    "pairs keep": (24, {}),
    "pairs five": (8, FIVE),
    "pairs keep five": (24, FIVE),
    "five": (0, FIVE),
    "six": (0, SIX),
}


RAN = "/tmp/ssd_trial_ran"
"""Where the first phase leaves what ran to its end: what hangs there is not timed."""


def mark(name, shape, width, gate):
    shape = {"T512": "T2048", "T32768": "T8192"}.get(shape, shape)
    return os.path.join(RAN, f"{name} {shape} {width} {gate}".replace(",", "").replace(" ", "_"))


def use(name):
    kernels._replay.forget()
    kernels_shipped._replay.forget()
    kernels_clean._replay.forget()
    if name == "clean":
        return clean_recurrence, use_clean
    if name == "shipped":
        return shipped_recurrence, use_shipped
    plan.FORM, more = VARIANTS[name]
    for key, x in (DEFAULT | more).items():
        setattr(plan, key, x)
        for module in ("walk_hopper_launch", "walk_hopper_states_launch"):
            module = sys.modules["kernels.walks." + module]
            if hasattr(module, key):
                setattr(module, key, x)
    return linear_recurrence, use_backend


def variants_of(width, gate, shape):
    """Those that differ, what is hoped of most first."""
    long, main = shape in ("T8192", "T32768"), shape == "T2048"
    if shape == "T256":
        return ["shipped", "clean", "lines", "after"]
    if gate == "ssd":
        found = ["shipped", "clean", "beside after late", "gluon beside after", "gluon beside", "gluon", "lines"]
        found += ["beside after late ahead"] if long else []
        return [*found, *(["gluon after", "beside after one group", "beside after two stages", "four stages"] if main else [])]
    if gate == "scalar":
        found = ["shipped", "clean", "lines", "after", "after late", *(["after late ahead"] if long else [])]
        return [*found, *(["five", "after late five"] if width == 64 and main else [])]
    if gate == "none":
        return ["shipped", "clean", "ahead", "after late", "after late ahead"]
    found = ["shipped", "clean", "pairs", "pairs keep", *(["ahead", "after late", "pairs keep after late"] if long else [])]
    return [*found, "five", "pairs five", "pairs keep five", "six"] if width == 64 and main else found


ROWS = [("T2048", 128, "ssd"), ("T2048", 64, "constant"), ("T2048", 64, "scalar"), ("T8192", 128, "ssd"), ("T512", 128, "ssd"),
        ("T8192", 64, "none"), ("T8192", 64, "constant"), ("T8192", 64, "scalar"), ("T8192", 128, "none"), ("T8192", 128, "scalar"),
        ("T512", 64, "constant"), ("T512", 64, "scalar"), ("T2048", 128, "constant"), ("T2048", 128, "scalar"), ("T256", 64, "scalar"),
        ("T8192", 128, "constant"), ("T32768", 128, "ssd"), ("T32768", 64, "none"), ("T32768", 64, "constant")]


def dims_of(width, gate):
    return (1, 128, 64) if gate == "ssd" else (HEADS, width, width)


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
        if strong:
            x["log_decay"] = -torch.arange(1, heads + 1, device="cuda") * 0.5
    if gate in ("scalar", "ssd"):
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


def others(x):
    """Inputs of the same shapes with other numbers: a call with them leaves memory that holds nothing of use to the next one."""
    return {n: 0.5 * t for n, t in x.items()}


def check_fp64(name, width, gate, shape, *, strong):
    batch, length, heads = shape
    groups, k_dim, v_dim = (1, 128, 64) if gate == "ssd" else (heads, width, width)
    x = draw(batch, length, heads, groups, k_dim, v_dim, gate, state=True, strong=strong)
    names = ["o", "final", *learned(x, gate)]
    function, backend = use(name)
    with backend("triton"):
        got, repeats = both_of(function, x, gate, state=True)[1](), 0
        for _ in range(8):
            both_of(function, others(x), gate, state=True)[1]()
            repeats += all(torch.equal(a, b) for a, b in zip(got, both_of(function, x, gate, state=True)[1](), strict=True))
    with use_backend("chunked"):
        want = both_of(linear_recurrence, {n: t.double() for n, t in x.items()}, gate, state=True)[1]()
    found = dict(zip(names, errors(got, want), strict=True))
    right = repeats == 8 and all(e <= (2e-2 if n == "log_decay" else 5e-3) for n, e in found.items())
    return {"right": right, "equal_repeats": repeats, "errors": {n: float(f"{e:.3g}") for n, e in found.items()}}


def say(path, record):
    with open(path, "a") as f:
        f.write(json.dumps(record) + "\n")


def no_others():
    for replay in (kernels._replay, kernels_shipped._replay, kernels_clean._replay):
        for one in replay.functions():
            one.others = lambda *_: ()


def prepared(name, shape, width, gate):
    batch, length = SHAPES[shape]
    heads = 2 if shape == "T256" else HEADS
    x = draw(batch, length, heads, 1 if gate == "ssd" else heads, *dims_of(width, gate)[1:], gate)
    function, backend = use(name)
    return x, function, backend


def started(part, what):
    """Whether this was started before, by this process or one that it replaces."""
    os.makedirs(RAN, exist_ok=True)
    path = os.path.join(RAN, f"part_{part}")
    before = open(path).read().splitlines() if os.path.exists(path) else []
    with open(path, "a") as f:
        f.write(str(what) + "\n")
    return str(what) in before


def anew():
    """After a fault nothing runs in this process: goes on in a new one."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.argv])


def warm(out, part, parts):
    no_others()
    kinds = [(s, w, g) for s, w, g in ROWS if s in ("T2048", "T8192", "T256")]
    kinds = [(name, s, w, g) for s, w, g in kinds for name in variants_of(w, g, s)]
    kinds = [t for t in kinds if t[0] != "shipped"] + [t for t in kinds if t[0] == "shipped"]
    mine = kinds[part::parts]
    for name, shape, width, gate in mine:
        if started(part, ("runs", name, shape, width, gate)):
            continue
        began = time.time()
        try:
            x, function, backend = prepared(name, shape, width, gate)
            with backend("triton"):
                forward, both = both_of(function, x, gate)
                forward()
                both()
            torch.cuda.synchronize()
            os.makedirs(RAN, exist_ok=True)
            open(mark(name, shape, width, gate), "w").close()
            record = {"task": [name, shape, width, gate], "seconds": round(time.time() - began, 1)}
        except Exception:
            record = {"task": [name, shape, width, gate], "failed": traceback.format_exc()[-1500:]}
        say(f"{out}/warm_{part}.jsonl", record)
        if "failed" in record:
            anew()
    for name, shape, width, gate in mine:
        small = (1, 1601, 4 if gate == "ssd" else 2) if shape == "T8192" else (8, 1100, 16)
        for strong in (False, True) if gate != "none" else (False,):
            if (name == "shipped" and gate != "scalar") or started(part, ("is right", name, shape, width, gate, strong)):
                continue
            try:
                found = check_fp64(name, width, gate, small, strong=strong)
            except Exception:
                found = {"right": False, "failed": traceback.format_exc()[-1500:]}
            say(f"{out}/warm_{part}.jsonl", {"variant": name, "width": width, "gate": gate, "batch, length, heads": small, "strong": strong, **found})
            if not found["right"]:
                print("WRONG", name, width, gate, small, strong, found, flush=True)
            if "failed" in found:
                anew()


def captured(call):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replays(graph, milliseconds):
    from triton.testing import do_bench

    return [1e3 * t for t in do_bench(graph.replay, warmup=1, rep=milliseconds, return_mode="all")]


def measure(out, began, limit):
    no_others()
    for shape, width, gate in ROWS:
        if time.time() - began > limit:
            say(f"{out}/ssd.jsonl", {"cut off before": [shape, width, gate]})
            print("cut off before", shape, width, gate, flush=True)
            break
        names, graphs, times, records, reference = variants_of(width, gate, shape), {}, {}, {}, None
        for name in names:
            if name != "shipped" and not os.path.exists(mark(name, shape, width, gate)):
                print(name, "left out", flush=True)
                continue
            record = records[name] = {"shape": shape, "width": width, "gate": gate, "variant": name}
            try:
                x, function, backend = prepared(name, shape, width, gate)
                with backend("triton"):
                    forward, both = both_of(function, x, gate)
                    got = both()
                    record["equal_repeats"], between = 0, both_of(function, others(x), gate)[1]
                    for _ in range(5):
                        between()
                        record["equal_repeats"] += all(bool(torch.equal(a, b)) for a, b in zip(got, both(), strict=True))
                    if reference is None:
                        reference = got
                    record["from_shipped"] = {n: float(f"{e:.3g}") for n, e in zip(["o", *learned(x, gate)], errors(got, reference), strict=True)}
                    record["right"] = record["equal_repeats"] == 5 and all(e <= (2e-2 if n == "log_decay" else 7e-3) for n, e in record["from_shipped"].items())
                    # The calls are kept, and what they read with them: memory of the others is given back at the next capture.
                    graphs[name] = captured(forward), captured(both), forward, both
                    times[name] = [], []
            except Exception:
                record["failed"] = traceback.format_exc()[-1500:]
                print(name, "FAILED", record["failed"][-300:], flush=True)
        for turn in range(4):
            for name in list(graphs)[:: -1 if turn % 2 else 1]:
                for which in (0, 1):
                    times[name][which].append(replays(graphs[name][which], 6))
        line = []
        for name in graphs:
            for which, key in enumerate(("forward", "both")):
                turns = times[name][which]
                flat = [t for one in turns for t in one]
                records[name][f"{key}_us"] = clock.timing(flat).model_dump()
                records[name][f"{key}_turns_us"] = [round(statistics.median(one), 2) for one in turns]
            line.append(f"{name}{'' if records[name]['right'] else ' WRONG'} {records[name]['forward_us']['median_us']:.1f} / {records[name]['both_us']['median_us']:.1f}")
        for record in records.values():
            say(f"{out}/ssd.jsonl", record)
        print(f"{time.time() - began:5.1f}s {shape} {width} {gate}: " + "; ".join(line), flush=True)
        del graphs, reference


def profiled(out):
    """Mean time of each kernel of both passes of the main row, one after the other or beside each other."""
    from torch.profiler import ProfilerActivity, profile

    for name in ("shipped", "gluon", "gluon beside after"):
        x, function, backend = prepared(name, "T2048", 128, "ssd")
        with backend("triton"):
            both = both_of(function, x, "ssd")[1]
            both()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                for _ in range(5):
                    both()
                torch.cuda.synchronize()
        events = [(e.time_range.start, e.name, e.time_range.elapsed_us()) for e in found.events() if "kernel" in e.name]
        times = {}
        for _, kernel, us in sorted(events):
            times.setdefault(kernel, []).append(round(us, 1))
        say(f"{out}/ssd.jsonl", {"kernels of": name, "us": {kernel: statistics.median(us) for kernel, us in times.items()}})
        print(name, {kernel: statistics.median(us) for kernel, us in times.items()}, flush=True)


if __name__ == "__main__":
    begin = time.time()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if sys.argv[1] == "warm":
        warm(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        import triton

        say(f"{sys.argv[2]}/ssd.jsonl", {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "ptxas": os.environ.get("TRITON_PTXAS_PATH"), "commit": os.environ.get("BENCH_COMMIT"), "seeds": "length + key width", "heads": HEADS})
        measure(sys.argv[2], begin, float(sys.argv[3]))
        try:
            profiled(sys.argv[2])
        except Exception:
            traceback.print_exc()
        try:
            say(f"{sys.argv[2]}/ssd.jsonl", {"ceilings": clock.ceilings(torch.device("cuda"))._asdict()})
        except Exception:
            traceback.print_exc()
