"""Trial: python trial_walk.py OUT.json"""
import json, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

FWD = {
    (128, 128): [("plain", 64, 64, 4, 2), ("plain", 64, 64, 4, 1), ("plain", 64, 32, 4, 2), ("plain", 64, 32, 4, 3), ("plain", 128, 64, 8, 2), ("plain", 32, 64, 4, 3), ("plain", 128, 128, 8, 1),
                 ("turned", 64, 128, 8, 2), ("turned", 64, 64, 4, 2)],
    (64, 64): [("plain", 64, 64, 4, 3), ("plain", 64, 64, 4, 2), ("plain", 128, 32, 4, 2), ("plain", 64, 32, 4, 2), ("plain", 64, 32, 4, 3), ("plain", 128, 64, 8, 2), ("turned", 64, 64, 4, 3), ("turned", 64, 64, 4, 2)],
    (128, 64): [("plain", 64, 64, 4, 2), ("plain", 64, 32, 4, 2), ("plain", 64, 64, 4, 3)],
}
# launches: (kernel, roles, turned, chunk, tile, warps, stages), ...
def P(roles, turned, chunk, tile, warps, stages): return ("pair", roles, turned, chunk, tile, warps, stages)
def W(chunk, tile, warps, stages): return ("walks", 0, False, chunk, tile, warps, stages)
def O(role, chunk, tile, warps, stages): return ("one", role, False, chunk, tile, warps, stages)
BWD = {
    (128, 128): [(W(64, 32, 4, 2),), (W(64, 64, 4, 1),), (W(64, 32, 4, 1),), (O(0, 64, 64, 4, 2), O(1, 64, 64, 4, 2), O(2, 64, 64, 4, 2)),
                 (P(1, True, 64, 128, 8, 2), P(2, True, 64, 128, 8, 2)), (O(0, 64, 64, 4, 2), P(2, True, 64, 128, 8, 2)), (O(0, 64, 64, 4, 2), P(2, False, 128, 128, 8, 1)),
                 (P(0, True, 64, 128, 8, 1),)],
    (64, 64): [(W(64, 32, 4, 2),), (W(64, 64, 4, 2),), (P(0, False, 64, 64, 4, 2),), (P(0, False, 64, 64, 4, 1),), (P(0, False, 64, 32, 4, 2),), (P(0, True, 64, 64, 4, 2),), (P(0, False, 64, 64, 4, 3),),
               (P(0, False, 32, 64, 4, 3),)],
    (128, 64): [(W(64, 32, 4, 2),), (P(0, False, 64, 64, 4, 2),), (P(0, False, 64, 128, 4, 1),), (P(0, False, 64, 64, 4, 1),), (P(0, True, 64, 128, 8, 2),), (P(0, False, 32, 64, 4, 2),)],
}
GATES = (0, 2)

def graph_ms(call):
    import torch
    from triton.testing import do_bench
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3): call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): call()
    return do_bench(graph.replay, warmup=10, rep=40, return_mode="median")

def tensors(B, T, G, H, K, V, gate, seed=0):
    import torch
    g = torch.Generator("cuda").manual_seed(seed)
    n = lambda *s: torch.randn(*s, device="cuda", generator=g).bfloat16()
    q, k, v, do = n(B, T, G, K), n(B, T, G, K) * K**-0.5, n(B, T, H, V), n(B, T, H, V)
    dec = None if gate == 0 else -torch.rand(B, T, H, device="cuda", generator=g)
    return q, k, v, do, dec

def common(q, k, v, dec, do=None):
    from kernels import walk
    import triton.language as tl
    rows, strides, unit = walk._rows(*([q, k, v] if do is None else [q, k, v, do]))
    gate, gs, every = walk._gate(dec, v.shape[0], v)
    return rows, strides, unit, gate, gs, every

def fwd(c, q, k, v, dec):
    import torch, triton.language as tl
    from kernels import walk, walk_trial_triton as walk_triton, walk_pair_triton as P_
    kind, chunk, tile, warps, stages = c
    B, T, H, V = v.shape; K = k.shape[3]; G = k.shape[2]
    o = torch.empty_like(v)
    (q, k, v), st, unit, gate, gs, every = common(q, k, v, dec)
    kern = walk_triton.forward_kernel if kind == "plain" else P_.turned_forward_kernel
    kern[(B * H * -(-V // tile),)](q, k, v, gate, v, o, v, *st, *gs, T, H, H // G, every, K=K, V=V, BK=K, BV=tile, UNIT=unit, C=chunk,
        GATE=0 if dec is None else 2, FIRST=False, LAST=False, DOT=walk._triton_dtype(v.dtype), PRECISION=walk._precision(v.dtype), STAGES=stages, num_warps=warps)
    return o

def bwd(launches, q, k, v, dec, do):
    import torch, triton.language as tl
    from kernels import walk, walk_trial_triton as walk_triton, walk_pair_triton as P_
    B, T, H, V = v.shape; K = k.shape[3]; G = k.shape[2]
    dq, dk = (v.new_empty(B, T, H, K) for _ in range(2)); dv = torch.empty_like(v)
    (q, k, v, do), st, unit, gate, gs, every = common(q, k, v, dec, do)
    gg = dec is not None
    parts = []
    for kind, role, turned, chunk, tile, warps, stages in launches:
        tk, tv = min(tile, K), min(tile, V)
        kt, vt = -(-K // tk), -(-V // tv)
        base = dict(K=K, V=V, BK=K, BV=V, TK=tk, UNIT=unit, C=chunk, GATE=0 if dec is None else 2, FIRST=False, DLAST=False, GATE_GRAD=gg, DOT=walk._triton_dtype(v.dtype), PRECISION=walk._precision(v.dtype), STAGES=stages, num_warps=warps)
        if kind == "walks":
            rs = v.new_empty((2 * kt, B, T, H) if gg else 0, dtype=torch.float32); parts.append(rs)
            walk_triton.backward_kernel[(B * H * (2 * kt + vt),)](q, k, v, gate, v, do, v, dq, dk, dv, v, rs, *st, *gs, T, B, H, H // G, every, TV=tv, **base)
        elif kind == "one":
            n = (kt, kt, vt)[role]
            rs = v.new_empty((n, B, T, H) if gg and role < 2 else 0, dtype=torch.float32); parts.append(rs)
            P_.one_kernel[(B * H * n,)](q, k, v, gate, v, do, v, dq, dk, dv, v, rs, *st, *gs, T, B, H, H // G, every, TV=tv, ROLE=role, **base)
        else:
            n = {0: 1 + kt, 1: kt, 2: 1}[role]
            rs = v.new_empty((1 + kt, B, T, H) if gg else 0, dtype=torch.float32)
            if gg: parts.append({0: rs, 1: rs[1:], 2: rs[:1]}[role])
            P_.pair_backward_kernel[(B * H * n,)](q, k, v, gate, v, do, v, dq, dk, dv, v, rs, *st, *gs, T, B, H, H // G, every, ROLES=role, TURNED=turned, **base)
    if G < H:
        dq, dk = (x.unflatten(2, (G, -1)).sum(3) for x in (dq, dk))
    if not gg: return dq, dk, dv
    rows = [p for p in parts if p.numel()]
    rs = (rows[0] if len(rows) == 1 else torch.cat(rows)).sum(0)
    return dq, dk, dv, rs.flip(1).cumsum(1).flip(1)

def scan_inputs(B, T, D, N):
    import torch
    g = torch.Generator("cuda").manual_seed(0)
    n = lambda *s: torch.randn(*s, device="cuda", generator=g).bfloat16()
    return n(B, T, D), torch.rand(B, T, D, device="cuda", generator=g) * 0.1, torch.rand(1, D, N, device="cuda", generator=g) + 0.5, n(B, T, N), n(B, T, N), n(B, T, D)

def scan_fwd(c, x, dt, rate, b, cc):
    import torch, triton
    from kernels import selective_scan_triton as O, scan_trial_triton as S
    kind, W, TILE, borders = c
    if kind == "old": return O.forward(x, dt, rate, b, cc, None)[0]
    B, T, D = x.shape; N = rate.shape[-1]; nt = -(-T // TILE)
    if kind == "ahead":
        st = x.new_empty(B, nt + 1, N, D, dtype=torch.float32); st[:, 0] = 0
        y = torch.empty_like(x)
        S.forward3[(B * -(-D // 32),)](x, dt, O._state_first(rate), O._time_last(b.float()), O._time_last(cc.float()), y, st, T, D, N, nt, B, TILE=16, CHANNELS=32, num_warps=1)
        return y
    st = x.new_empty(B, nt + 1 if borders else 1, N, D, dtype=torch.float32) if borders else x.new_zeros(B * (nt + 1), N, D, dtype=torch.float32)[:1]
    if borders: st[:, 0] = 0
    else: st = x.new_zeros(B, nt + 1, N, D, dtype=torch.float32) if T < 1000 else ZERO.setdefault("z", x.new_zeros(B, nt + 1, N, D, dtype=torch.float32))
    y = torch.empty_like(x); final = x.new_empty(B, N, D, dtype=torch.float32)
    S.forward2[(B * -(-D // 32),)](x, dt, O._state_first(rate), O._time_last(b.float()), O._time_last(cc.float()), y, st, final, T, D, nt, B, N=N, W=W, TILE=TILE, CHANNELS=32, BORDERS=borders, num_warps=W)
    return y
ZERO = {}

def scan_bwd(c, x, dt, rate, b, cc, dy, st):
    import torch
    from kernels import selective_scan_triton as O, scan_trial_triton as S
    kind, dots = c
    if kind == "old": return O.backward(dy, None, x, dt, rate, b, cc, st)[:5]
    B, T, D = x.shape; N = rate.shape[-1]; nt, nb = -(-T // 16), -(-D // 32)
    dx, ddt = torch.empty_like(x), torch.empty_like(dt)
    dr = x.new_zeros(B, N, D, dtype=torch.float32); ds = torch.zeros_like(dr)
    db, dc = (x.new_empty(nb, B, N, nt * 16, dtype=torch.float32) for _ in range(2))
    (S.backward3 if kind == 'ahead' else S.backward2)[(B * nb,)](dy, x, dt, O._state_first(rate), O._time_last(b.float()), O._time_last(cc.float()), st, dx, ddt, dr, db, dc, ds, T, D, N, nt, B, B, TILE=16, CHANNELS=32, DOTS=dots, num_warps=1)
    db, dc = (p.sum(0)[..., :T].mT for p in (db, dc))
    return dx, ddt, dr.sum(0).mT[None].contiguous(), db.to(b.dtype).contiguous(), dc.to(b.dtype).contiguous()

def scan_job(job, B, T, D, time_it):
    import torch
    from kernels import selective_scan_triton as O
    t = time.time()
    x, dt, rate, b, cc, dy = scan_inputs(B, T, D, 16)
    side, c = job[0], job[3]
    _, _, st = O.forward(x, dt, rate, b, cc, None) if side == "scanbwd" or not time_it else (0, 0, 0)
    call = (lambda: (scan_fwd(c, x, dt, rate, b, cc),)) if side == "scanfwd" else (lambda: scan_bwd(c, x, dt, rate, b, cc, dy, st))
    try:
        if time_it: return {"ms": round(graph_ms(call), 4)}
        want = (O.forward(x, dt, rate, b, cc, None)[0],) if side == "scanfwd" else O.backward(dy, None, x, dt, rate, b, cc, st)[:5]
        got = call(); torch.cuda.synchronize()
    except Exception as e:
        if "CUDA error" in repr(e) and time_it: os._exit(1)
        return {"error": repr(e)[:200]}
    return {"err": [float(f"{float((a.float() - b_.float()).square().mean().sqrt() / b_.float().square().mean().sqrt()):.2g}") for a, b_ in zip(got, want)], "s": round(time.time() - t, 1)}

SCANS = [("scanfwd", 0, 0, c) for c in (("old", 0, 0, 0), ("ahead", 1, 16, True), ("new", 1, 16, True), ("new", 1, 16, False), ("new", 1, 8, False), ("new", 1, 8, True), ("new", 4, 16, False))] + [("scanbwd", 0, 0, c) for c in (("old", 0), ("new", 0), ("new", 1), ("new", 2), ("ahead", 0), ("ahead", 1))]

SHIP = [("ship", (64, 64), g, (t, n)) for g in GATES for t, n in ((2048, 128), (2048, 256), (512, 128), (8192, 128), (8192, 256), (32768, 128), (32768, 256))]
SHIP += [("ship", (128, 64), g, (2048, n)) for g in GATES for n in (128, 256, 512)]
SHIP += [("shipfwd", (128, 128), g, (t, n)) for g in GATES for t, n in ((2048, 256), (8192, 128), (8192, 256), (32768, 128))]

def whole(job):
    T, n = job[3]
    return n // (max(1, 16384 // T) * 16) <= 1

def ship(job, time_it):
    import torch
    from kernels import chunked, walk, walk_pieces
    side, (K, V), gate, (T, n) = job
    walk.BACKWARD_16[128] = walk.Config(64, 64, 4, 2, together=True) if V == 64 else walk.Config(64, 32, 4, 2)
    walk_pieces.HEADS_AT_ONCE, walk_pieces.SHORTEST_SEGMENT = n if time_it else 1 if whole(job) else 128, 512 if time_it else 64
    t = time.time()
    B, T, G, H = (max(1, 16384 // T), T, 1 if K != V else 16, 16) if time_it else (2, 300, 1 if K != V else 3, 3)
    q, k, v, do, dec = tensors(B, T, G, H, K, V, gate)
    try:
        fw = lambda: walk.forward(q, k, v, dec, None, None, return_state=False)
        o, _, entering = fw()
        bw = lambda: walk.backward(q, k, v, dec, None, None, entering, do, None, None, gate_grad=gate > 0)
        if time_it:
            f = graph_ms(fw)
            return {"fwd": round(f, 4), "ms": round(f + graph_ms(bw), 4) if side == "ship" else round(f, 4)}
        leaves = [x.double().requires_grad_() for x in ((q, k, v) if dec is None else (q, k, v, dec))]
        want = chunked.linear_recurrence(leaves[0], leaves[1], leaves[2], log_decay=leaves[3] if gate else None)[0]
        grads = torch.autograd.grad(want, leaves, do.double())
        got = (o, *bw()) if side == "ship" else (o,)
        torch.cuda.synchronize()
        return {"err": [float(f"{float((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt()):.2g}") for a, b in zip(got, (want, *grads))], "s": round(time.time() - t, 1)}
    except Exception as e:
        if "CUDA error" in repr(e) and time_it: os._exit(1)
        return {"error": repr(e)[:200]}

ELEMENT = [("element", 0, 0, (t, n)) for t, n in ((2048, 1024), (2048, 2048), (512, 1024), (8192, 1024), (8192, 2048), (32768, 1024), (32768, 2048))]

def element(job, time_it):
    import torch
    from kernels import scan_segments_triton as seg, scan_triton
    from kernels.reference import scan_reference
    T, n = job[3]
    seg.PROGRAMS = n
    try:
        g = torch.Generator("cuda").manual_seed(0)
        shape = (max(1, 16384 // T), T, 4096) if time_it else (2, 600, 100)
        a, x, dh = torch.rand(shape, device="cuda", generator=g).bfloat16(), *(torch.randn(shape, device="cuda", generator=g).bfloat16() for _ in "xd")
        fw = lambda: scan_triton.forward(a, x, None)
        h = fw()
        bw = lambda: scan_triton.backward(dh, a, h, None)
        if time_it:
            f = graph_ms(fw)
            return {"fwd": round(f, 4), "ms": round(f + graph_ms(bw), 4)}
        leaves = [y.double().requires_grad_() for y in (a, x)]
        want = scan_reference(*leaves)
        pairs = zip((h, *bw()[:2]), (want, *torch.autograd.grad(want, leaves, dh.double())))
        return {"err": [float(f"{float((p.double() - q).square().mean().sqrt() / q.square().mean().sqrt()):.2g}") for p, q in pairs], "s": 0}
    except Exception as e:
        if "CUDA error" in repr(e) and time_it: os._exit(1)
        return {"error": repr(e)[:200]}

def check(job):
    if job[0] == "element": return element(job, False)
    if job[0].startswith("ship"): return ship(job, False)
    if job[0].startswith("scan"): return scan_job(job, 2, 75, 160, False)
    side, (K, V), gate, c = job
    import torch
    from kernels import chunked
    t = time.time()
    B, T, G, H = 2, 150, (1 if K != V else 3), 3
    q, k, v, do, dec = tensors(B, T, G, H, K, V, gate)
    leaves = [x.double().requires_grad_() for x in ((q, k, v) if dec is None else (q, k, v, dec))]
    o = chunked.linear_recurrence(leaves[0], leaves[1], leaves[2], log_decay=leaves[3] if gate else None)[0]
    want = (o,) if side == "fwd" else torch.autograd.grad(o, leaves, do.double())
    try:
        got = (fwd(c, q, k, v, dec),) if side == "fwd" else bwd(c, q, k, v, dec, do)
        torch.cuda.synchronize()
    except Exception as e:
        return {"error": repr(e)[:200], "s": time.time() - t}
    err = [float((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in zip(got, want)]
    return {"err": [float(f"{e:.2g}") for e in err], "s": round(time.time() - t, 1)}

def clock(job):
    if job[0] == "element": return element(job, True)
    if job[0].startswith("ship"): return ship(job, True)
    if job[0].startswith("scan"): return scan_job(job, 8, 2048, 4096, True)
    side, (K, V), gate, c = job
    import torch
    q, k, v, do, dec = tensors(8, 2048, 1 if K != V else 16, 16, K, V, gate)
    try:
        call = (lambda: fwd(c, q, k, v, dec)) if side == "fwd" else (lambda: bwd(c, q, k, v, dec, do))
        return {"ms": round(graph_ms(call), 4)}
    except Exception as e:
        if "CUDA error" in repr(e): os._exit(1)
        return {"error": repr(e)[:200]}

def run(jobs, check, clock, out, budget):
    t0 = time.time(); rows = []
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool:
        same, futures = {}, []
        for j in jobs:
            key = (*j[:3], whole(j)) if j[0].startswith("ship") else j
            if key not in same: same[key] = pool.submit(check, j)
            futures.append((j, same[key]))
        found = []
        for j, f in futures:
            try: found.append((j, f.result(timeout=max(1, budget * 0.6 - (time.time() - t0)))))
            except BaseException as e: found.append((j, {"error": "pool " + repr(e)[:80]}))
        for p in list(pool._processes.values()):
            if any("pool" in r.get("error", "") for _, r in found): p.kill()
    print("checked", round(time.time() - t0, 1), flush=True)
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    for j, r in found:
        row = {"job": [str(x) for x in j], **r}
        if "err" in r and time.time() - t0 < budget:
            try: row |= pool.submit(clock, j).result(timeout=30)
            except BaseException as e:
                row["error"] = "clock " + repr(e)[:80]
                pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        rows.append(row); json.dump(rows, open(out, "w"), indent=0)
        print(*j, {x: y for x, y in r.items()}, row.get("fwd", ""), row.get("ms"), row.get("error", ""), flush=True)
    print("done", round(time.time() - t0, 1))

if __name__ == "__main__":
    jobs = [("bwd", s, g, c) for s, cs in BWD.items() for g in GATES for c in cs if g == 0 or c[0][0] == "pair"] + SHIP + SCANS + ELEMENT
    jobs += [("fwd", s, g, c) for s, cs in FWD.items() for g in GATES for c in cs]
    run(jobs, check, clock, sys.argv[1], float(sys.argv[2]))
    ranked = {}
    for r in json.load(open(sys.argv[1])):
        if "ms" in r: ranked.setdefault(tuple(r["job"][:3]), []).append((r["ms"], r["job"][3], max(r["err"])))
    for key, found in ranked.items():
        print(*key, *(f"| {ms} {c} e{e:.0e}" for ms, c, e in sorted(found)[:3]))
