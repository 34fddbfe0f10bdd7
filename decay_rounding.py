"""Rounding of the gradient of scalar log decays by the walks, followed in torch on a CPU: python decay_rounding.py > RECORD

The walks' sums with their roundings (states and decayed operands in bf16, sums in fp32), rows cut into segments as the walks
for Hopper cut those of one head, and these ways to sum: to the end of the row; with chunks that forget more than 2^LIMIT read from
their own sums; from <S, dS> at the end of each segment; both; and without segments, from <S, dS> rounded every 16 chunks.
"""
import json

import torch

L2, C, SEEDS = 1.4426950408889634, 64, range(4)
NINF = float("-inf")


def bf(x):
    return x.to(torch.bfloat16).to(x.dtype)


def states(b, c, g, span, r, reverse):
    """State that enters each chunk of the walk, as segments of `span` chunks make it: starts combined from sums over segments."""
    N, K, V = b.shape[0] // C, b.shape[1], c.shape[1]
    G = g.view(N, C).cumsum(1)
    tot = G[:, -1]
    keep = G if reverse else tot[:, None] - G
    add = torch.einsum("nck,ncv->nkv", r(b.view(N, C, K) * torch.exp2(keep)[..., None]), c.view(N, C, V))
    order = list(range(N))[::-1] if reverse else list(range(N))
    groups = [[n for n in order if n // span == p] for p in sorted({n // span for n in order}, reverse=reverse)]
    out, start = torch.empty_like(add), torch.zeros(K, V, dtype=b.dtype)
    ends = {}
    for group in groups:
        S = start.clone()
        for n in group:
            out[n] = S
            S = S * torch.exp2(tot[n]) + add[n]
        # the sum over the segment: each operand decayed by all that follows, then rounded
        after, T = torch.zeros((), dtype=b.dtype), torch.zeros_like(start)
        for n in group[::-1]:
            T += r(b[n * C : n * C + C] * torch.exp2(keep[n] + after)[:, None]).T @ c[n * C : n * C + C]
            after = after + tot[n]
        start = start * torch.exp2(after) + T
        ends[group[0] // span] = start
    return out, ends, tot


def parts(q, k, v, do, g, span, dt, rounded):
    """Sums of a token that queries read from the state [T], of the rest [T], log2 decays of chunks, and <S, dS> behind segments."""
    r = bf if rounded else (lambda x: x)
    q, k, v, do = (x.to(dt) for x in (q, k, v, do))
    g = g.to(dt) * L2
    T, D = q.shape
    N = T // C
    S, ends, tot = states(k, v, g, span, r, False)
    dS, dends, _ = states(q, do, g, span, r, True)
    G = g.view(N, C).cumsum(1)
    q3, k3, v3, do3 = (x.view(N, C, D) for x in (q, k, v, do))
    reads = (torch.einsum("ncv,nkv->nck", do3, r(S)) * torch.exp2(G)[..., None] * q3).sum(2)
    gives = (torch.einsum("nck,nkv->ncv", k3, r(dS)) * torch.exp2(tot[:, None] - G)[..., None] * v3).sum(2)
    seen = torch.ones(C, C, dtype=torch.bool).tril(-1)
    P = torch.exp2(torch.where(seen, G[:, :, None] - G[:, None, :], torch.tensor(NINF, dtype=dt)))
    P = torch.einsum("nik,njk->nij", q3, k3) * P * torch.einsum("niv,njv->nij", do3, v3)
    rest = P.sum(2) - P.sum(1) - gives
    last = max(ends)
    base = {p: (ends[p] * r(dends[p + 1])).sum() if p < last else torch.zeros((), dtype=dt) for p in ends}
    exact_ds = {p: (ends[p] * dends[p + 1]).sum() if p < last else torch.zeros((), dtype=dt) for p in ends}
    return reads, rest, tot, base, exact_ds


def suffix(reads, rest, tot, limit=None, base=None, span=None):
    own = reads + rest
    N = own.shape[0]
    within = own.flip(1).cumsum(1).flip(1)
    total, later, out = own.sum(1), torch.zeros((), dtype=own.dtype), torch.empty_like(own)
    for n in reversed(range(N)):
        if base is not None and (n == N - 1 or (n + 1) % span == 0):
            later = base[n // span]
        if limit is not None and tot[n] < limit:
            later = -rest[n].sum()
        out[n] = later + within[n]
        later = later + total[n]
    return out


def error(x, t):
    return round(float((x.double() - t).square().mean().sqrt() / t.square().mean().sqrt()), 5)


GATES = {
    "-5 u^4": lambda T: -(5 * torch.rand(T) ** 4),
    "-10 u": lambda T: -(10 * torch.rand(T)),
    "-|n| / 8": lambda T: -torch.randn(T).abs() / 8,
    "-|n| / 64": lambda T: -torch.randn(T).abs() / 64,
}


def run(T, D, span, gate, seed):
    torch.manual_seed(seed)
    q, k, v, do = bf(torch.randn(T, D)), bf(torch.randn(T, D) * D**-0.5), bf(torch.randn(T, D)), bf(torch.randn(T, D))
    g = GATES[gate](T)
    exact = parts(q, k, v, do, g, T // C, torch.float64, False)
    t = suffix(*exact[:3])
    reads, rest, tot, base, base_exact = parts(q, k, v, do, g, span, torch.float32, True)
    N, ends = T // C, torch.zeros(())
    whole = parts(q, k, v, do, g, N, torch.float32, True)[:3]
    kept, dkept = (bf(states(a.float(), b.float(), g * L2, N, bf, back)[0]) for a, b, back in ((k, v, False), (q, do, True)))
    runs = {p: (kept[16 * p + 16] * dkept[16 * p + 15]).sum() if 16 * p + 16 < N else ends for p in range(-(-N // 16))}
    return {
        "whole row": error(suffix(*whole), t),
        "runs of 16 kept chunks": error(suffix(*whole, None, runs, 16), t),
        "to the end": error(suffix(reads, rest, tot), t),
        "chunks": error(suffix(reads, rest, tot, -24), t),
        "chunks, 2^-16": error(suffix(reads, rest, tot, -16), t),
        "chunks, 2^-9": error(suffix(reads, rest, tot, -9), t),
        "segments": error(suffix(reads, rest, tot, None, base, span), t),
        "segments, dS not rounded": error(suffix(reads, rest, tot, None, base_exact, span), t),
        "both": error(suffix(reads, rest, tot, -24, base, span), t),
        "share of chunks": round(float((tot < -24).float().mean()), 4),
    }


def main():
    torch.set_num_threads(1)
    for D in (128, 64):
        for T, span in ((1600, 9), (8192, 8), (32768, 8)):
            for gate in GATES:
                found = [run(T, D, span, gate, seed) for seed in SEEDS]
                row = {"tokens": T, "width": D, "gate": gate, "segment": span * C, "seeds": list(SEEDS), "n": len(SEEDS)}
                print(json.dumps(row | {name: [x[name] for x in found] for name in found[0]}), flush=True)


if __name__ == "__main__":
    main()
