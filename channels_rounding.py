"""Follows the roundings of the gated long convolution in fp64 on a CPU."""
import json, math, sys, torch
from tests.kernels import cases_channels as cases
from tests.kernels.oracle import rms_error
torch.set_num_threads(1)
STEPS = ("key", "shift", "filtered", "product", "filter", "gated", "dk")
def r(x): return x.bfloat16().double()
class Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return r(x)
    @staticmethod
    def backward(ctx, d): return r(d)
def toeplitz(taps, T):
    lag = torch.arange(T)[:, None] - torch.arange(T)
    own = torch.zeros(len(taps), T, dtype=taps.dtype); n = min(T, taps.shape[1]); own = torch.cat((taps[:, :n], own[:, n:]), 1)
    return own[:, lag.clamp(0)] * (lag >= 0)
def diagonals(m, n):  # [D,T,T] -> sums at lags
    T = m.shape[-1]; out = torch.zeros(len(m), n, dtype=m.dtype)
    for lag in range(min(n, T)): out[:, lag] = m.diagonal(-lag, 1, 2).sum(-1)
    return out
def kernel(l, dy, steps, sums=True):
    R = {s: (r if s in steps else (lambda x: x)) for s in STEPS}
    H = len(l["filter"]); q, k, v = l["qkv"].chunk(3); bq, bk, bv = (b[:, None, None] for b in l["bias"].chunk(3)); T = q.shape[-1]
    q, v, kin = q + bq, v + bv, R["key"](k + bk)
    S, F = toeplitz(R["shift"](l["shift"]), T), toeplitz(R["filter"](l["filter"]), T)
    k = R["filtered"](torch.einsum("dts,dbs->dbt", S, kin))
    sp = lambda a: a.unflatten(0, (-1, H))
    qh, kh, vh, dyh = sp(q), sp(k), sp(v), sp(dy)
    p, g = R["product"](kh[:, None] * vh), R["gated"](qh[:, None] * dyh)
    fp, dp = torch.einsum("hts,ijhbs->ijhbt", F, p), torch.einsum("hts,ijhbt->ijhbs", F, g)
    y = (qh[:, None] * fp).sum(0).flatten(0, 1)
    dq, dv = (dyh * fp).sum(1).flatten(0, 1), (kh[:, None] * dp).sum(0).flatten(0, 1)
    dk = R["dk"]((vh * dp).sum(1).flatten(0, 1))
    dkin = torch.einsum("dts,dbt->dbs", S, dk)
    terms = torch.cat((dq, dkin, dv))
    pairs = torch.einsum("dbt,dbs->dts", dk, kin)
    out = {"y": y, "dqkv": terms, "dbias": terms.sum((1, 2)), "dfilter": diagonals(torch.einsum("ijhbt,ijhbs->hts", g, p), l["filter"].shape[1]), "dshift": diagonals(pairs, l["shift"].shape[1])}
    if not sums: return out
    sq = torch.einsum("dbt,dbs->dts", dk**2, kin**2); n = l["shift"].shape[1]
    ab = diagonals(torch.einsum("dbt,dbs->dts", dk.abs(), kin.abs()), n)
    # a term of dbias of a key is itself a sum over taps
    abk = torch.einsum("dts,dbt->d", S.abs(), dk.abs()); rsk = torch.einsum("dts,dbt->d", S**2, dk**2).sqrt()
    D = len(dq); a = terms.abs().sum((1, 2)); s = terms.square().sum((1, 2)).sqrt()
    a2, s2 = a.clone(), s.clone(); a2[D:2*D], s2[D:2*D] = abk, rsk
    size = {"dbias": {"sum|terms|": a, "rss": s, "sum|products|": a2, "rss products": s2}, "dshift": {"sum|terms|": ab, "rss": diagonals(sq, n).sqrt()}}
    return out, size
def before(l, dy, bias):
    R = Both.apply; o = {n: x.clone().requires_grad_() for n, x in l.items()}; H = len(l["filter"]); T = dy.shape[-1]
    b = R(o["bias"]) if bias else o["bias"]
    q, k, v = R(o["qkv"] + b[:, None, None]).chunk(3)
    rt = lambda t: t + (r(t.detach()) - t.detach())
    k = R(torch.einsum("dts,dbs->dbt", toeplitz(rt(o["shift"]), T), k))
    q, k, v = (a.unflatten(0, (-1, H)) for a in (q, k, v))
    p = R(R(k)[:, None] * R(v)); y = R(torch.einsum("hts,ijhbs->ijhbt", toeplitz(rt(o["filter"]), T), p))
    y = R(R(q[:, None] * y).sum(0).flatten(0, 1))
    g = torch.autograd.grad(y, list(o.values()), dy)
    return {"y": y.detach()} | {f"d{n}": x for n, x in zip(o, g)}
def case_rows(case, seeds):
    row = {"case": list(case), "seeds": list(seeds), "n": len(seeds), "all": [], "before": [], "before, bias not rounded": [], "one": {s: [] for s in STEPS}, "without": {s: [] for s in STEPS}, "sizes": []}
    for seed in seeds:
        torch.manual_seed(seed); leaves = cases.leaves_of(case, "cpu", torch.bfloat16)
        dy = torch.randn(len(leaves["qkv"]) // 3, *case[2:4]).bfloat16().double()
        l = {n: x.detach().double() for n, x in leaves.items()}
        true, size = kernel(l, dy, ())
        if seed == 0:
            own = cases.in_fp64(leaves); d = cases.differentiated(cases.definition(own), own, dy)
            assert all(rms_error(true[n], d[n]) < 1e-12 for n in d)
        err = lambda got, names=None: {n: float(f"{rms_error(got[n], true[n]):.3g}") for n in names or true}
        allr = kernel(l, dy, STEPS, False)
        row["all"].append(err(allr)); row["before"].append(err(before(l, dy, True))); row["before, bias not rounded"].append(err(before(l, dy, False)))
        for s in STEPS:
            row["one"][s].append(err(kernel(l, dy, (s,), False), ("dbias", "dshift")))
            row["without"][s].append(err(kernel(l, dy, [x for x in STEPS if x != s], False), ("dbias", "dshift")))
        row["sizes"].append({n: {w: float(f"{float(true[n].norm() / x.norm()):.3g}") for w, x in ws.items()} for n, ws in size.items()})
    return row
if __name__ == "__main__":
    rows = []
    for case in [(1, 1, 1, 5, 1), (2, 2, 2, 70, 300), (1, 2, 70, 100, 100), (2, 1, 2, 256, 32), (1, 7, 130, 192, 40)]:
        row = case_rows(case, range(int(sys.argv[1]))); rows.append(row)
        f = lambda k, n: " ".join(f"{1e3*x[n]:.1f}" for x in k)
        print(case)
        for n in ("dbias", "dshift", "dqkv", "y"): print(" ", n, "all", f(row["all"], n), "| before", f(row["before"], n), "| exact bias", f(row["before, bias not rounded"], n))
        for n in ("dbias", "dshift"):
            for s in STEPS: print("   ", n, s, "one", f(row["one"][s], n))
            for w in row["sizes"][0][n]: print("    size", n, w, [x[n][w] for x in row["sizes"]])
        sys.stdout.flush()
    json.dump(rows, open("/tmp/channels_rounding.json", "w"))
