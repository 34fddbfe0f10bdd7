"""Variants of the delta rule's Hopper kernels: python trial/delta_trial.py {time,warm} OUT [part parts]; MODE base times main's."""
import json, os, sys, time, itertools
from pathlib import Path
HERE = Path(__file__).parent
BASE = os.environ.get("BASE") == "1"
sys.path.insert(0, str(HERE.parent))
if BASE:
    sys.path.insert(0, str(HERE / "base"))
import torch
from torch.nn import functional as F
import kernels
from kernels import delta, delta_hopper_launch as L
assert ("base" in kernels.__file__) == BASE, kernels.__file__
from kernels.dispatch import use_backend
from kernels.recurrence import linear_recurrence

T0 = time.time()
LIMIT = float(os.environ.get("LIMIT", "1000"))
MAIN, SHORT, LONG, LONGER = (8, 2048, 16), (32, 512, 16), (2, 8192, 16), (1, 32768, 16)
SMALL = (64, 256, 2)
OUT = None


def draw(shape, gate, seed=0):
    b, t, h, d = shape
    torch.manual_seed(seed)
    q, k, v = (torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    beta = torch.rand(b, t, h, device="cuda")
    g = -torch.rand(b, t, h, device="cuda") / 8 if gate == "scalar" else None
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, g, torch.randn_like(v)


def forward(x):
    q, k, v, beta, g, _ = x
    return delta.forward(q, k, v, beta, g, None, return_state=False, keep=False)[0]


def both(x):
    q, k, v, beta, g, do = x
    o, _, kept = delta.forward(q, k, v, beta, g, None, return_state=False, keep=True)
    return o, *delta.backward(q, k, beta, g, None, kept, do, None, gate_grad=g is not None)[: 5 if g is not None else 4]


_want = {}


def want(shape, gate):
    key = (shape, gate)
    if key not in _want:
        q, k, v, beta, g, do = draw(shape, gate, 1)
        leaves = [x.double().requires_grad_() for x in (q, k, v, beta, *([g] if g is not None else []))]
        with use_backend("chunked"):
            o, _ = linear_recurrence(leaves[0], leaves[1], leaves[2], beta_BTH=leaves[3], log_decay=leaves[4] if g is not None else None)
        _want[key] = [o, *torch.autograd.grad(o, leaves, do.double())]
    return _want[key]


def error(got, true):
    return float((got.double() - true).square().mean().sqrt() / true.square().mean().sqrt())


NAMES = ("o", "q", "k", "v", "beta", "gate")
LIMITS = dict(o=5e-3, q=8e-3, k=8e-3, v=8e-3, beta=2e-2, gate=2e-2)


def check(d, gate, segments):
    shape = (1, 64 * 37 + 20, 2, d)
    true, x = want(shape, gate), draw(shape, gate, 1)
    found = {"alone": error(forward(x), true[0])}
    found |= {n: error(a, b) for n, a, b in zip(NAMES, both(x), true)}
    ok = all(e <= LIMITS.get(n, 5e-3) for n, e in found.items())
    return ok, {n: round(e, 5) for n, e in found.items()}


def timed(call):
    for _ in range(2):
        call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    n, marks = 60, []
    for _ in range(n):
        flush.zero_()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); graph.replay(); b.record()
        marks.append((a, b))
    torch.cuda.synchronize()
    ms = sorted(a.elapsed_time(b) for a, b in marks)
    return [round(ms[int(s * (n - 1))], 5) for s in (0.5, 0.05, 0.95)] + [n]


def use(plan=None, back=None, stages=None):
    if BASE:
        return
    if plan is not None:
        L.plan_of = lambda k, v, *, gated, keep: L.Plan(*(plan[1] if keep and isinstance(plan[0], tuple) else plan[0] if isinstance(plan[0], tuple) else plan))
    L.segments_of = (lambda *_: back) if back else REAL_SEGMENTS
    if stages:
        L.carry_stages = lambda width, *, reverse: stages
    else:
        L.carry_stages = REAL_STAGES


if not BASE:
    REAL_SEGMENTS, REAL_STAGES, REAL_PLAN = L.segments_of, L.carry_stages, L.plan_of


def variants():
    """(shape, d, gate, what, plan, segments of the backward pass, stages of carries)"""
    rows = []
    if BASE:
        for d, gate, shape in itertools.product((128, 64), ("none", "scalar"), (LONG, LONGER, MAIN)):
            rows.append((shape, d, gate, "fb", None, None, None))
        return rows
    add = lambda *a: rows.append((*a[:5], *(a[5:] + (None, None))[:2]))
    gates = ("none", "scalar")
    for gate in gates:
        for d, st in ((128, 3), (64, 4)):
            add(LONG, d, gate, "fb", (1, 1, 0, st, 4))
            add(LONG, d, gate, "fb", (1, 1, 0, st, 4, 132 - d // 2))
            add(LONG, d, gate, "fb", (4, 1, 0, st, 4))
            add(LONGER, d, gate, "fb", (4, 1, 0, st, 4))
            add(LONGER, d, gate, "fb", (8, 1, 0, st, 4))
        add(MAIN, 128, gate, "fb", (1, 2, 0, 3, 2, 0, 216))
        add(MAIN, 128, gate, "fb", (1, 2, 3, 3, 2, 0, 208))
        add(MAIN, 64, gate, "fb", (1, 1, 2, 5, 4))
        add(MAIN, 64, gate, "fb", (1, 1, 0, 4, 4))
        add(MAIN, 128, gate, "fb", (1, 2, 0, 3, 2, 0, 208))
        add(MAIN, 128, gate, "fb", (1, 2, 0, 2, 3, 0, 216))
        add(MAIN, 128, gate, "f", (1, 2, 0, 3, 3, 0, 216))
        add(MAIN, 64, gate, "fb", (1, 1, 2, 4, 3))
        add(MAIN, 64, gate, "fb", (1, 1, 2, 3, 2))
        add(MAIN, 64, gate, "f", (1, 1, 0, 5, 5))
        add(MAIN, 128, gate, "fb", (1, 2, 0 if gate == "scalar" else 1, 3, 2))
    add(MAIN, 128, "none", "f", (1, 2, 1, 4, 2))
    add(MAIN, 128, "none", "f", (1, 2, 1, 3, 3))
    for gate in gates:
        for d, st in ((128, 3), (64, 4)):
            add(LONG, d, gate, "f", (2, 1, 0, st, 4))
            add(LONG, d, gate, "f", (3, 1, 0, st, 4))
            add(LONG, d, gate, "f", (1, 1, 0, 3, 2))
            add(LONG, d, gate, "f", (1, 1, 0, st, 3))
            add(LONGER, d, gate, "f", (2, 1, 0, st, 4))
            add(LONGER, d, gate, "f", (6, 1, 0, st, 4))
            add(LONG, d, gate, "b", (1, 1, 0, st, 4), 3)
            add(LONGER, d, gate, "b", (4, 1, 0, st, 4), 6)
            add(LONG, d, gate, "b", (1, 1, 0, st, 4), None, 2)
            add(LONG, d, gate, "b", (1, 1, 0, st, 4), None, 3)
        add(LONGER, 128, gate, "f", (8, 2, 0, 3, 2, 0, 216))
        add(LONGER, 128, gate, "f", (5, 1, 0, 3, 4))
        add(LONG, 128, gate, "f", (4, 2, 0, 3, 2, 0, 216))
        add(LONG, 128, gate, "f", (1, 1, 0, 4, 3))
        add(LONG, 64, gate, "f", (1, 1, 0, 5, 5, 100))
        add(SHORT, 128, gate, "fb", (1, 2, 0, 3, 2, 0, 216))
        add(SHORT, 128, gate, "fb", (1, 2, 3, 3, 2, 0, 208))
        add(SHORT, 64, gate, "fb", (1, 1, 2, 5, 4))
        add(SHORT, 64, gate, "f", (1, 1, 0, 4, 4))
        add(SHORT, 64, gate, "f", (1, 1, 2, 3, 2))
        add(SMALL, 64, gate, "fb", (1, 1, 2, 5, 4))
        add(SMALL, 64, gate, "f", (1, 1, 0, 4, 4))
        add(SMALL, 64, gate, "fb", (1, 1, 2, 3, 2))
    return rows


def main():
    mode, out = sys.argv[1], Path(sys.argv[2])
    part, parts = (int(sys.argv[3]), int(sys.argv[4])) if len(sys.argv) > 3 else (0, 1)
    rows, seen, checked = [], {}, {}
    head = {"base": BASE, "commit": (HERE.parent / ".commit").read_text().strip() if (HERE.parent / ".commit").exists() else os.environ.get("BENCH_COMMIT", ""),
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "seed": 0,
            "n": "[median, 5 %, 95 %, replays] ms of a CUDA graph, 256 MiB written before each replay"}
    try:
        import triton
        head["triton"] = triton.__version__
    except Exception:
        pass
    todo = variants() if BASE else [v for v in variants() if (len(v[4]) > 5 and v[4][5] > 0) == (os.environ.get("MAKERS") == "1")]
    if mode == "warm" and BASE:
        todo = todo[part::parts]
    elif mode == "warm":
        kinds = {}
        for v in todo:
            kinds.setdefault((v[1], v[2], v[4] if v[4] is None else v[4][1:], v[4] is not None and v[4][0] > 1, v[6]), v)
        todo = list(kinds.values())[part::parts]
    for shape, d, gate, what, plan, back, stages in todo:
        if time.time() - T0 > LIMIT:
            print("time is up", flush=True)
            break
        row = {"shape": (*shape, d), "gate": gate, "plan": plan, "back_segments": back, "carry_stages": stages}
        try:
            use(plan, back or (plan[0] if plan and plan[0] > 1 and mode == "warm" else None), stages)
            key = (d, gate, plan, back, stages)
            if BASE:
                checked[key] = True, {}
                x = draw((*shape, d), gate)
                forward(x), both(x)
                torch.cuda.synchronize()
            if key not in checked:
                # few heads at a short length: as many segments back as at the timed shape
                use(plan, back or {LONG: 4, LONGER: 8}.get(shape), stages)
                checked[key] = check(d, gate, plan and plan[0])
                use(plan, back, stages)
            row["right"], row["errors"] = checked[key]
            if mode == "time" and row["right"]:
                x = draw((*shape, d), gate)
                o = forward(x)
                torch.cuda.synchronize()
                first = seen.setdefault((shape, d, gate), o.clone())
                row["differs"] = round(error(o, first.double()), 5)
                row["repeats"] = bool(torch.equal(o, forward(x)))
                if "f" in what:
                    row["forward_ms"] = timed(lambda: forward(x))
                if "b" in what:
                    row["both_ms"] = timed(lambda: both(x))
                if shape not in (LONG, LONGER):
                    seen.clear()
        except Exception as e:  # noqa: BLE001
            row["failed"] = repr(e)[:300]
        rows.append(row)
        out.write_text(json.dumps(head | {"rows": rows}, indent=0) + "\n")
        print(f"{time.time() - T0:5.1f}", row["shape"], gate, plan, "back", back, "st", stages, "right", row.get("right"),
              "f", row.get("forward_ms", [0])[0], "fb", row.get("both_ms", [0])[0], row.get("failed", ""), row.get("repeats"), row.get("differs"),
              "" if row.get("right") else row.get("errors"), flush=True)
    if mode == "time" and (BASE or os.environ.get("MAKERS") == "1"):
        parts_of(out.with_suffix(".kernels.json"))


def parts_of(out):
    """Mean us of each kernel of both passes, without flushes."""
    from torch.profiler import ProfilerActivity, profile
    found = []
    for shape, d, gate in itertools.product((LONG, LONGER, MAIN), (128, 64), ("none", "scalar")):
        if not BASE:
            use({LONG: (1, 1, 0, 3, 4), LONGER: (4 if d == 128 else 8, 1, 0, 3, 4), MAIN: (1, d // 64, 0, 3, 2, 0, 216)}[shape])
        x = draw((*shape, d), gate)
        both(x)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(5):
                both(x)
            torch.cuda.synchronize()
        parts = {e.key[:40]: round(e.device_time_total / 5, 1) for e in seen.key_averages() if e.device_time_total}
        found.append({"shape": (*shape, d), "gate": gate, "us": parts})
        out.write_text(json.dumps(found))
        print(shape, d, gate, parts, flush=True)


main()
