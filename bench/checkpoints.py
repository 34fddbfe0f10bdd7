"""Checkpoints of runs on disk: tensors, numbers and strings, and a digest of them all."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from bench.store import Store

Checkpoint = dict[str, Any]
"""What `bench.member.Member.checkpoint` gives."""
DIGEST_BYTES = hashlib.sha256().digest_size


def save_checkpoint(store: Store, identity: str, state: Checkpoint) -> None:
    """Writes a checkpoint and its digest, which torch's format lacks; a reader sees the old one or the new one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    store.put(identity, "checkpoint.pt", content + hashlib.sha256(content).digest())


def load_checkpoint(path: Path, device: torch.device) -> Checkpoint:
    """The checkpoint in a file.

    Raises:
        ValueError: a part of it is missing or was changed.
        OSError: it cannot be read.
    """
    found = path.read_bytes()
    content, digest = found[:-DIGEST_BYTES], found[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("it was damaged or cut off")
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
