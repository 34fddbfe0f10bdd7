"""Follows the roundings of the gated long convolution on the draws of a GPU's generator, made on a CPU; some of them left out."""

import json
import sys

import numpy as np
import torch
from torch import Tensor

from tests.kernels import followed_channels as plain
from tests.kernels.oracle import rms_error

CASES = ((1, 1, 1, 5, 1), (2, 2, 2, 70, 300), (1, 2, 70, 100, 100), (2, 1, 2, 256, 32), (1, 7, 130, 192, 40))
WIDE = (2, 64, 4, 200, 200)
STEPS = ("key", "shift", "filtered", "product", "filter", "gated", "dk")
LEFT_OUT = {
    "all": (),
    "without those of filters": ("shift", "filter"),
    "without those of keys before the shift, of their gradient and the shift in dbias": ("key", "cheap"),
} | {f"only {step}": tuple(set(STEPS) - {step}) for step in STEPS}


class Generator:
    """torch.randn of a CUDA generator (Philox 4x32-10, Box-Muller) of a device of 132 multiprocessors."""

    def __init__(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def randn(self, *shape: int) -> Tensor:
        count = int(np.prod(shape))
        threads = 256 * min(132 * 8, -(-count // 256))
        rounds = (count - 1) // (threads * 4) + 1
        index, zero = np.arange(threads, dtype=np.uint64), np.zeros(threads, np.uint64)
        drawn = []
        for turn in range(rounds):
            a, b, c, d = philox([zero + np.uint64(self.offset // 4 + turn), zero, index, zero], self.seed)
            drawn += [*box_muller(a, b), *box_muller(c, d)]
        self.offset += rounds * 4
        return torch.from_numpy(np.concatenate(drawn)[:count].copy()).view(*shape)


def philox(counter: list, seed: int) -> list:
    low, keys = np.uint64(0xFFFFFFFF), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        shift = np.uint64(32)
        counter = [
            second >> shift ^ counter[1] ^ np.uint64(keys[0]), second & low,
            first >> shift ^ counter[3] ^ np.uint64(keys[1]), first & low,
        ]  # fmt: skip
        keys = [keys[0] + 0x9E3779B9 & 0xFFFFFFFF, keys[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return counter


def box_muller(x, y):
    unit = np.float32(2.3283064e-10)
    angle = np.float32(2.3283064e-10 * 6.2831855)
    radius = np.sqrt(np.float32(-2) * np.log(x.astype(np.float32) * unit + unit / 2))
    turned = y.astype(np.float32) * angle + angle / 2
    return radius * np.sin(turned), radius * np.cos(turned)


def drawn(case, seed):
    generator, (width, heads, batch, length, taps) = Generator(seed), case
    leaves = {
        "qkv": generator.randn(3 * width * heads, batch, length).bfloat16(),
        "bias": generator.randn(3 * width * heads),
        "filter": generator.randn(heads, length) / length**0.5,
        "shift": generator.randn(width * heads, taps) / taps**0.5,
    }
    return leaves, generator.randn(width * heads, batch, length).bfloat16()


def followed(leaves, weight, left_out):
    """Like `plain.followed` in bf16, which is this with nothing left out but for rounded outputs."""

    def rounded(x, step):
        return x if step in left_out else x.bfloat16().double()

    qkv, bias, taps, shift = (leaf.double() for leaf in leaves.values())
    dy, size = plain._per_head(weight.double(), len(taps)), qkv.shape[-1]
    queries, keys, values = (qkv + bias[:, None, None]).chunk(3)
    keys = rounded(keys, "key")
    shift_DTT, taps_HTT = plain._toeplitz(rounded(shift, "shift"), size), plain._toeplitz(rounded(taps, "filter"), size)
    q, k, v = (plain._per_head(part, len(taps)) for part in (queries, rounded(keys @ shift_DTT.mT, "filtered"), values))
    products, gated = rounded(k[:, None] * v, "product"), rounded(q[:, None] * dy, "gated")
    convolved, d_products = products @ taps_HTT.mT, gated @ taps_HTT
    dq, dv = (dy * convolved).sum(1).flatten(0, 1), (k[:, None] * d_products).sum(0).flatten(0, 1)
    exact_dk = (v * d_products).sum(1).flatten(0, 1)
    dk = rounded(exact_dk, "dk")
    dkeys = exact_dk @ plain._toeplitz(shift, size) if "cheap" in left_out else dk @ shift_DTT
    return {
        "dbias": torch.cat((dq, dkeys, dv)).sum((1, 2)),
        "dfilter": plain._by_lag((gated.mT @ products).sum((0, 1)), taps.shape[1]),
        "dshift": plain._by_lag(dk.mT @ keys, shift.shape[1]),
    }


def main(path, seeds):
    torch.set_num_threads(1)
    rows = []
    for case in (*CASES, WIDE):
        errors = {what: {name: [] for name in ("dbias", "dfilter", "dshift")} for what in LEFT_OUT}
        for seed in range(seeds):
            leaves, weight = drawn(case, seed)
            true, own = followed(leaves, weight, (*STEPS, "cheap")), plain.followed(leaves, weight, torch.bfloat16)
            exact = plain.followed(leaves, weight, torch.float64)
            assert all(rms_error(true[name], exact[name]) < 1e-12 for name in true)
            for what, left_out in LEFT_OUT.items():
                got = followed(leaves, weight, left_out)
                assert what != "all" or all(rms_error(got[name], own[name]) < 1e-12 for name in true)
                for name, tensor in got.items():
                    errors[what][name].append(float(f"{rms_error(tensor, true[name]):.3g}"))
        rows.append({"case": case, "seeds": list(range(seeds)), "n": seeds, "errors": errors})
        print(case)
        for what, names in errors.items():
            shown = {
                n: (f"{1e3 * e[0]:.2f}", f"rms {1e3 * np.square(e).mean() ** 0.5:.2f}", f"max {1e3 * max(e):.1f}", sum(x > 5e-3 for x in e))
                for n, e in names.items()
            }
            print("  ", what.ljust(34)[:34], shown, flush=True)
    json.dump(rows, open(path, "w"))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
