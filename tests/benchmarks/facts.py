"""What every record of a GPU benchmark says about where its numbers come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from typing import Any

import torch

from bench import provenance
from bench.throughput.clock import MEASURED_MS


def facts(command: str, seed: int | None = None) -> dict[str, object]:
    """Commit, versions, device, time, how a number was taken, and the seed, if any, from which inputs are drawn from here on."""
    if seed is not None:
        torch.manual_seed(seed)
    commit, dirty, _ = provenance.git_state()
    return {
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "versions": provenance.versions(),
        "device": torch.cuda.get_device_name(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "n": f"median of the replays of a CUDA graph within {MEASURED_MS} ms, L2 flushed before each; random inputs",
    }


def swept(
    candidates: Sequence[Any], compile_one: Callable[[Any], None], measure: Callable[[Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row a candidate; several processes compile all of them beforehand, into Triton's cache on disk."""
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, candidates))
    rows = []
    for candidate in candidates:
        rows.append(measure(candidate))
        print(json.dumps(rows[-1]), flush=True)
    return rows
