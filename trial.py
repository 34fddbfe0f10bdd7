"""Trial: variants of the vector-gate kernels, Taylor and window; every variant is checked before it is timed."""
import json, os, sys, time, traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
import torch
from torch.nn.functional import logsigmoid, normalize

OUT = Path(os.environ.get("JOB_OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
T0 = time.time()
from kernels import vector_gate as vg, vector_gate_config as vc
from kernels.vector_gate_config import Tile
from triton.testing import do_bench

def graph_ms(call, rep=40):
    s = torch.cuda.Stream()
    with torch.cuda.stream(s):
        for _ in range(2): call()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): call()
    return do_bench(g.replay, warmup=10, rep=rep, return_mode="median")

PARTS = {
    "prepare": [(64,4,1),(32,4,1),(64,8,1),(128,4,1),(128,8,1),(64,4,1,168),(64,4,1,128),(32,4,1,128)],
    "walk": [(64,4,1),(64,4,2),(64,4,3),(32,4,2),(32,4,1),(128,8,2),(64,8,2),(64,8,1)],
    "reverse": [(64,4,1),(64,4,2),(32,4,2),(32,4,1),(128,8,2),(64,8,2),(64,8,1)],
    "gradient": [(64,8,1),(64,4,1),(32,4,1),(32,8,1),(64,8,1,128),(32,4,1,128),(32,4,2),(64,8,2)],
}
JOBS = [(part, tile, delta) for part, tiles in PARTS.items() for tile in tiles for delta in (False, True)]

def draw(shape, delta, gate, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    b, t, h, d = shape
    q, k, v, z = (torch.randn(b, t, h, d, device="cuda") for _ in range(4))
    g = (logsigmoid(z) / gate).to(dtype)
    beta = torch.rand(b, t, h, device="cuda") if delta else None
    return (q * d ** -0.5).bfloat16(), normalize(k, dim=-1).bfloat16(), v.bfloat16(), g, beta

def call_of(inputs, keep=True):
    q, k, v, g, beta = inputs
    kept = vg.kept_like(q, k, v, delta=beta is not None, keep=keep)
    return vg.Call(q, k, v, g, beta, None, None, kept)

def with_tile(part, tile):
    vc.SIXTEEN_BIT[128] = BASE._replace(**{part: Tile(*tile)})

BASE = vc.SIXTEEN_BIT[128]

def run_part(part, inputs, do):
    call = call_of(inputs)
    call.prepare(); o, _ = call.walk(return_state=False, keep=True)
    dv, dbeta, _, dstates = call.reverse(do, None)
    grads = call.gradients(do, dv, dstates)
    fns = {"prepare": call.prepare, "walk": lambda: call.walk(return_state=False, keep=False), "walk_keep": lambda: call.walk(return_state=False, keep=True),
           "reverse": lambda: call.reverse(do, None), "gradient": lambda: call.gradients(do, dv, dstates)}
    outs = [o, dv, *(x for x in grads if x.numel())] + ([dbeta.sum(0)] if inputs[4] is not None else [])
    return fns, outs

def compile_job(job):
    part, tile, delta = job
    try:
        with_tile(part, tile)
        inputs = draw((1, 100, 1, 128), delta, 16.0)
        fns, _ = run_part(part, inputs, torch.randn_like(inputs[2]))
        for f in (fns["walk"],): f()
        torch.cuda.synchronize()
        return None
    except Exception as e:
        return f"{job}: {type(e).__name__} {str(e)[:150]}"

def err(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))

def reference(inputs, do):
    from kernels.reference import linear_recurrence_reference
    q, k, v, g, beta = inputs
    leaves = [x.double().requires_grad_() for x in (q, k, v, g)] + ([beta.double().requires_grad_()] if beta is not None else [])
    named = {"log_decay": leaves[3]} | ({"beta_BTH": leaves[4]} if beta is not None else {})
    o, _ = linear_recurrence_reference(leaves[0], leaves[1], leaves[2], **named)
    gr = torch.autograd.grad(o, leaves, do.double())
    return [o, gr[2], gr[0], gr[1], gr[3]] + ([gr[4]] if beta is not None else [])

def section(name, f):
    try:
        return f()
    except Exception:
        print("FAILED", name); traceback.print_exc(limit=3)
    finally:
        print(f"[{time.time()-T0:.0f} s] {name}", flush=True)

RECORD = {}
def save(): (OUT / "vg.json").write_text(json.dumps(RECORD, indent=1))

def vector_gate():
    refs = {}
    for delta in (False, True):
        for gate in (16.0, 1.0, 0.1):
            inputs = draw((1, 200, 2, 128), delta, gate)
            do = torch.randn_like(inputs[2])
            refs[delta, gate] = inputs, do, reference(inputs, do)
    for (delta, gate), (inputs, do, want) in refs.items():
        with_tile("prepare", tuple(BASE.prepare))
        _, got = run_part("", inputs, do)
        print("shipped errors", delta, gate, ["%.1e" % err(a, b) for a, b in zip(got, want)], flush=True)
    RECORD["parts"] = []
    for part, tile, delta in JOBS:
        row = {"part": part, "tile": tile, "delta": delta}
        try:
            with_tile(part, tile)
            bad = 0
            for gate in (16.0, 1.0, 0.1):
                inputs, do, want = refs[delta, gate]
                _, got = run_part(part, inputs, do)
                bad = max(bad, *(err(a, b) for a, b in zip(got, want)))
            row["worst_error"] = bad
            if not bad < 2e-2:
                row["wrong"] = True
            inputs = MAINS[delta]
            fns, _ = run_part(part, inputs, DO)
            for name, f in fns.items():
                if name.startswith(part): row[name] = graph_ms(f)
            del fns
        except Exception as e:
            row["error"] = f"{type(e).__name__} {str(e)[:100]}"
            if "illegal" in str(e).lower(): raise
        RECORD["parts"].append(row); save()
        print({k: (round(v, 4) if isinstance(v, float) else v) for k, v in row.items()}, flush=True)
    with_tile("prepare", tuple(BASE.prepare))
    for delta in (False, True):
        for gate in (1.0, 0.1):
            inputs = draw((8, 2048, 16, 128), delta, gate)
            fns, _ = run_part("", inputs, DO)
            row = {"gate": gate, "delta": delta, **{n: round(graph_ms(f), 4) for n, f in fns.items()}}
            print(row, flush=True); RECORD.setdefault("gates", []).append(row); save()

def taylor_window():
    from tests.benchmarks import taylor, indexed_attention as ia
    from kernels.dispatch import use_backend
    from kernels.taylor import taylor_attention
    from torch.profiler import profile, ProfilerActivity
    def prof(f, name):
        f(); torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            for _ in range(3): f()
            torch.cuda.synchronize()
        print(name, {e.key[:40]: round(e.self_device_time_total / 3) for e in p.key_averages() if e.self_device_time_total > 0}, flush=True)
    q, k, v = (torch.randn(8, 2048, 16, n, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (16, 16, 64))
    with use_backend("triton"):
        section("taylor prof", lambda: prof(lambda: torch.autograd.grad(taylor_attention(q, k, v, eps=1e-6)[0], (q, k, v), torch.ones_like(v)), "taylor"))
    for c in TAYLOR:
        r = taylor.try_one(c, taylor.MAIN); print(json.dumps(r), flush=True); RECORD.setdefault("taylor", []).append(r); save()
    for c in WINDOW:
        r = ia.try_one(c, 8, 2048); print(json.dumps(r), flush=True); RECORD.setdefault("window", []).append(r); save()

def compile_taylor(c):
    from tests.benchmarks import taylor
    taylor.compile_one(c)
def compile_window(c):
    from tests.benchmarks import indexed_attention as ia
    ia.compile_one(c)

from kernels import taylor_launch as tl_, indexed_launch as il
TC, IC = tl_.Config, il.Config
TAYLOR = [("forward", tl_.SIXTEEN_BIT[64].forward, c) for c in (256, 512)]
TAYLOR += [("forward", TC(*t), 512) for t in ((128,64,64,4,3,168),(64,64,64,4,3),(64,64,64,4,3,128),(64,64,64,4,3,168),(64,64,96,4,3))]
TAYLOR += [("state", TC(*t), 512) for t in ((0,64,64,4,4),(0,64,96,4,3),(0,128,64,4,2))]
TAYLOR += [("query", TC(*t), 512) for t in ((64,64,32,4,1),(64,64,32,4,1,168),(128,64,32,4,1),(64,64,64,4,2,168))]
TAYLOR += [("key", TC(*t), 512) for t in ((64,64,64,4,1),(64,64,32,4,1),(64,64,32,4,1,168),(32,64,64,4,2,168),(32,64,32,4,2,168))]
WINDOW = [("forward", IC(*t), 128) for t in ((64,64,4,2),(64,64,4,2,168),(64,64,4,1,168),(64,64,4,1),(64,32,4,2,168),(128,64,8,1,128),(128,64,8,2,128))]
WINDOW += [("query", IC(*t), 128) for t in ((64,64,4,2,168),(64,64,4,1,168),(64,32,4,2,168),(128,64,8,2,128))]
WINDOW += [("key", IC(*t), 128) for t in ((32,64,4,2,168),(32,64,8,2,128),(64,64,8,2,128),(64,64,8,1,128),(32,64,4,1,168))]

if __name__ == "__main__":
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool:
        a = [pool.submit(compile_job, j) for j in JOBS]
        b = [pool.submit(compile_taylor, c) for c in TAYLOR] + [pool.submit(compile_window, c) for c in WINDOW]
        for f in a:
            try:
                if f.result(timeout=60): print(f.result())
            except Exception as e: print("compile", repr(e)[:100])
        for f in b:
            try: f.result(timeout=60)
            except Exception as e: print("compile", repr(e)[:100])
    print(f"[{time.time()-T0:.0f} s] compiled", flush=True)
    MAINS = {d: draw((8, 2048, 16, 128), d, 16.0) for d in (False, True)}
    DO = torch.randn_like(MAINS[False][2])
    section("vector gate", vector_gate)
    section("taylor and window", taylor_window)
    save()
