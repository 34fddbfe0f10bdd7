import json, os, sys, time
import torch, triton
import trial_scan as T
from kernels import _replay
from kernels.scans import selective_scan_launch as launch
OUT = os.environ.get("JOB_OUT", "/tmp")
EXACT = {}
f32, bf = torch.float32, torch.bfloat16
# name: (tokens between kept states, their dtype, backward's arguments)
V = {
 "ahead": (8, f32, dict(L=8, ahead=True, maxnreg=None)),
 "ahead_s4k1": (8, f32, dict(L=8, ahead=True, maxnreg=None, stored=4, kept=1)),
 "ahead_s8": (8, f32, dict(L=8, ahead=True, maxnreg=None, stored=8)),
 "ahead_s8_bf": (8, bf, dict(L=8, ahead=True, maxnreg=None, stored=8)),
 "ahead_s4k1_bf": (8, bf, dict(L=8, ahead=True, maxnreg=None, stored=4, kept=1)),
 "ahead_bf": (8, bf, dict(L=8, ahead=True, maxnreg=None)),
 "plain_bf_255": (8, bf, dict(L=8, maxnreg=None)),
 "plain_bf_168": (8, bf, dict(L=8, maxnreg=168)),
 "ask_bf_168": (8, bf, dict(L=8, maxnreg=168, ask=True)),
 "s4_bf_168": (8, bf, dict(L=8, maxnreg=168, stored=4)),
 "plain_bf_128": (8, bf, dict(L=8, maxnreg=128)),
 "twofold_bf": (8, bf, dict(L=8, maxnreg=None, kernel="twofold")),
 "twofold_ask_bf": (8, bf, dict(L=8, maxnreg=None, kernel="twofold", ask=True)),
 "fours_bf": (4, bf, dict(L=8, maxnreg=None, kernel="fours")),
 "fours_ask_bf": (4, bf, dict(L=8, maxnreg=None, kernel="fours", ask=True)),
 "fours_ahead_bf": (4, bf, dict(L=8, maxnreg=None, kernel="fours", ahead=True)),
 "l16_ask": (16, f32, dict(L=16, maxnreg=None, ask=True)),
 "l16_s3_ask": (16, f32, dict(L=16, maxnreg=None, ask=True, stored=3)),
}
OMITTED = {"ahead_s4k1_bf": (1, 2), "fours_ask_bf": (2,)}
FLEET = ["ahead_s8_bf", "ahead_s4k1_bf", "ahead_bf", "plain_bf_168", "ask_bf_168", "s4_bf_168", "plain_bf_128", "fours_ask_bf"]
MAIN = {"2048": (8, 2048, 4096), "512": (32, 512, 4096), "8192": (2, 8192, 4096), "32768": (1, 32768, 4096)}
SMALL = {"fleet_d128_T256": (1024, 256, 256), "fleet_d128_T64": (1024, 64, 256), "fleet_d64_T64": (1024, 64, 128), "fleet_d256_T128": (1024, 128, 512), "small": (64, 256, 128)}

def draw(batch, length, width, members=1, seed=0, dt_fleet=True):
    g = torch.Generator("cuda").manual_seed(seed)
    r = lambda *s: torch.randn(*s, device="cuda", generator=g)
    dt = torch.nn.functional.softplus(r(batch, length, width) - 3)
    rate = (torch.arange(1, 17, device="cuda").float().expand(members, width, 16) * (0.5 + torch.rand(members, width, 1, device="cuda", generator=g))).contiguous()
    return r(batch, length, width).to(bf), dt, rate, r(batch, length, 16).to(bf), r(batch, length, 16).to(bf), r(batch, length, width).to(bf)

def exact(x, dt, rate, b, c, dy, df):
    members = rate.shape[0]
    leaves = [t.double().requires_grad_() for t in (x, dt, rate, b, c)]
    X, D, R, B, C = leaves
    Rb = R.repeat_interleave(x.shape[0] // members, 0)
    h0 = torch.zeros(x.shape[0], x.shape[2], 16, device="cuda", dtype=torch.float64, requires_grad=True)
    h, ys = h0, []
    for t in range(x.shape[1]):
        h = torch.exp(-D[:, t, :, None] * Rb) * h + (D[:, t] * X[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    total = (torch.stack(ys, 1) * dy.double()).sum() + (0 if df is None else (h * df.double()).sum())
    return torch.stack(ys, 1).detach(), torch.autograd.grad(total, [*leaves, h0])

def gate(name, width, length, batch, members, final):
    each, kind, kw = V[name]
    x, dt, rate, b, c, dy = draw(batch, length, width, members)
    df = torch.randn(batch, width, 16, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) if final else None
    if (width, batch) not in EXACT: EXACT[width, batch] = exact(x, dt, rate, b, c, dy, df)
    y, want = EXACT[width, batch]
    got_y, _, states = T.forward(x, dt, rate, b, c, each, kind, limit=128)
    got = T.backward(dy, df, x, dt, rate, b, c, states, **kw)
    pairs = zip(("y", "dx", "ddt", "drate", "db", "dc", "dstart"), (got_y, *got), (y, *want))
    err = {n: round(((g.double() - w.view(g.shape)).norm() / w.norm()).item(), 7) for n, g, w in pairs}
    again = T.backward(dy, df, x, dt, rate, b, c, states, **kw)
    same = all(torch.equal(p, q) for p, q in zip(got, again))
    limits = dict(drate=2e-2, ddt=2e-2)
    return {"gate": name, "shape": [batch, length, width, members], "errors": err, "same": same, "ok": same and all(v < limits.get(n, 5e-3) for n, v in err.items())}

def timed(fn, budget=0.035):
    fn(); torch.cuda.synchronize()
    s = torch.cuda.Stream()
    with torch.cuda.stream(s):
        fn()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=s): fn()
    torch.cuda.synchronize()
    times, start = [], time.time()
    while len(times) < 5 or time.time() - start < budget:
        FLUSH.zero_()
        a, z = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); graph.replay(); z.record(); z.synchronize()
        times.append(a.elapsed_time(z) * 1000)
    return round(sorted(times)[len(times) // 2], 1)

def warm(part, parts):
    jobs = [(n, w) for w in (4096, 104) for n in V] + [(n, w) for n in FLEET for w in (256, 128, 512)] + [(n, o) for n in OMITTED for o in OMITTED[n]]
    jobs = [j for i, j in enumerate(jobs) if i % parts == part]
    if part == 0:
        x, dt, rate, b, c, dy = draw(8, 16, 4096)
        for each, kind in ((16, f32), (8, f32), (8, bf), (4, bf)):
            for limit in (None, 128, 200): T.forward(x, dt, rate, b, c, each, kind, limit=limit)
    if part == 2:
        for w in (104, 128, 256, 512):
            x, dt, rate, b, c, dy = draw(8, 16, w)
            for each, kind in ((16, f32), (8, f32), (8, bf), (4, bf)): T.forward(x, dt, rate, b, c, each, kind, limit=128)
    if part == 1:
        for shape in ((512, 16, 4096), (8, 16, 4096), (1, 4096, 4096), (1024, 16, 256), (64, 16, 128)):
            x, dt, rate, b, c, dy = draw(*shape)
            y, f, st = launch.forward(x, dt, rate, b, c, None, None, keep=True)
            launch.backward(dy, None, x, dt, rate, b, c, st, None)
    for name, what in jobs:
        each, kind, kw = V[name]
        width = what if what > 8 else 4096
        length, final = (17, True) if width == 104 else (16, False)
        x, dt, rate, b, c, dy = draw(1, length, width)
        states = x.new_zeros(1, -(-length // 16) * (16 // each) + 1, width, 16, dtype=kind)
        df = torch.zeros(1, width, 16, device="cuda") if final else None
        try: T.backward(dy, df, x, dt, rate, b, c, states, **kw, omit=what if what < 8 else 0)
        except Exception as e: print(name, what, repr(e)[:300])
        torch.cuda.synchronize(); print(name, what, round(time.time() - BEGIN, 1), flush=True)

def main():
    rows = []
    def put(row):
        rows.append(row)
        with open(f"{OUT}/scanback.json", "w") as f: json.dump({"device": torch.cuda.get_device_name(), "commit": os.environ.get("BENCH_COMMIT"), "torch": torch.__version__, "triton": triton.__version__, "rows": rows}, f)
        print(round(time.time() - BEGIN, 1), json.dumps(row), flush=True)
    good = []
    for name in V:
        try:
            found = [gate(name, 104, 53, 3, 3, True), gate(name, 4096, 64, 1, 1, False)]
            for row in found: put(row)
            if all(r["ok"] for r in found): good.append(name)
        except Exception as e: put({"gate": name, "failed": repr(e)[:300]})
    a = torch.empty(2 ** 28, device="cuda", dtype=torch.uint8); z = torch.empty_like(a)
    t = timed(lambda: z.copy_(a)); put({"copy_TB_per_s": round(2 * 2 ** 28 / t / 1e6, 3)})
    for key, shape in {**MAIN, **SMALL}.items():
        if time.time() - BEGIN > 63: break
        _replay.forget()
        x, dt, rate, b, c, dy = draw(*shape, members=4 if shape[0] == 1024 else 1)
        y, f, st = launch.forward(x, dt, rate, b, c, None, None, keep=True)
        old = launch.backward(dy, None, x, dt, rate, b, c, st, None)
        put({"shape": key, "name": "shipped", "forward_us": timed(lambda: launch.forward(x, dt, rate, b, c, None, None, keep=True)), "inference_us": timed(lambda: launch.forward(x, dt, rate, b, c, None, None, keep=False)), "backward_us": timed(lambda: launch.backward(dy, None, x, dt, rate, b, c, st, None))})
        if key in ("2048", "8192"):
            for each, kind in ((16, f32), (8, f32), (8, bf), (4, bf)):
                for limit in (None, 128, 200):
                    put({"shape": key, "forward": [each, str(kind), limit], "forward_us": timed(lambda: T.forward(x, dt, rate, b, c, each, kind, limit=limit))})
        kept = {}
        for name in (good if key in ("2048", "512", "fleet_d128_T256") and (key in MAIN or True) else good):
            if key not in MAIN and name not in FLEET: continue
            if key in ("8192", "32768") and name not in ("ahead_s4k1_bf", "ahead_s8_bf", "s4_bf_168", "fours_ask_bf"): continue
            if time.time() - BEGIN > 65: break
            each, kind, kw = V[name]
            try:
                if (each, kind) not in kept:
                    kept.clear()
                    kept[each, kind] = T.forward(x, dt, rate, b, c, each, kind, limit=128)[2], timed(lambda: T.forward(x, dt, rate, b, c, each, kind, limit=128))
                states, forward_us = kept[each, kind]
                got = T.backward(dy, None, x, dt, rate, b, c, states, **kw)
                apart = max(((p.float() - q.float().view(p.shape)).norm() / q.float().norm()).item() for p, q in zip(got[:5], old[:5]))
                row = {"shape": key, "name": name, "forward_us": forward_us, "backward_us": timed(lambda: T.backward(dy, None, x, dt, rate, b, c, states, **kw)), "kernel_us": timed(lambda: T.backward(dy, None, x, dt, rate, b, c, states, sums="none", **kw)), "apart": round(apart, 5)}
                if name == "ahead_s4k1_bf": row["torch_sums_us"] = timed(lambda: T.backward(dy, None, x, dt, rate, b, c, states, sums="torch", **kw))
                put(row)
                if key == "2048":
                    for o in OMITTED.get(name, ()): put({"shape": key, "name": name, "without": {1: "exponentials", 2: "sums over channels"}[o], "kernel_us": timed(lambda: T.backward(dy, None, x, dt, rate, b, c, states, sums="none", omit=o, **kw))})
            except Exception as e: put({"shape": key, "name": name, "failed": repr(e)[:300]})
        kept.clear()
    print("shape, name, forward, backward, kernel")
    for r in rows:
        if "backward_us" in r: print(r["shape"], r["name"], r["forward_us"], r["backward_us"], r.get("kernel_us"), r.get("apart"))

BEGIN = time.time()
if sys.argv[1] == "warm": warm(int(sys.argv[2]), int(sys.argv[3]))
else:
    FLUSH = torch.empty(2 ** 28, device="cuda", dtype=torch.uint8)
    main()
