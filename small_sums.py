"""Errors of the gated long convolution on a GPU, against its roundings followed in fp64 and against fp64 without any."""

import json
import os
import sys
from collections.abc import Iterator

import torch
import triton

from kernels.conv import gated_long_conv
from kernels.dispatch import use_backend
from tests.gpu.test_channels import LARGE
from tests.kernels import cases_channels as cases
from tests.kernels.followed_channels import followed
from tests.kernels.oracle import poisoned, rms_error

KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def rows(seeds: int) -> Iterator[dict]:
    for seed in range(seeds):
        for case in [*cases.CASES, *reversed(LARGE)]:
            for kind, dtype in KINDS.items():
                torch.manual_seed(seed)
                leaves = cases.leaves_of(case, "cuda", dtype)
                weight = torch.randn(len(leaves["qkv"]) // 3, *case[2:4], device="cuda").to(dtype)
                with use_backend("triton"), poisoned():
                    got = cases.differentiated(gated_long_conv(*leaves.values()), leaves, weight)
                own, true = followed(leaves, weight, dtype), followed(leaves, weight, torch.float64)
                pairs = {"kernel to fp64": (got, true), "followed to fp64": (own, true), "kernel to followed": (got, own)}
                yield {"seed": seed, "case": case, "dtype": kind} | {
                    what: {name: float(f"{rms_error(a[name], b[name]):.3g}") for name in true} for what, (a, b) in pairs.items()
                }


def main(path: str, seeds: int) -> None:
    torch.set_num_threads(1)
    head = {
        "command": f"python small_sums.py OUT.json {seeds}",
        "commit": os.environ.get("BENCH_COMMIT", ""),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "device": torch.cuda.get_device_name(),
    }
    found = []
    for row in rows(seeds):
        found.append(row)
        with open(path, "w") as file:
            json.dump(head | {"rows": found}, file)
        shown = (f"{what}: " + " ".join(f"{name} {1e3 * x:.3f}" for name, x in row[what].items()) for what in list(row)[3:])
        print(row["seed"], row["case"], row["dtype"], "| 1e-3 |", " | ".join(shown), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
