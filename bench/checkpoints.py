"""Checkpoints as bytes: tensors, numbers and strings, and a digest of them all, which torch's own format lacks."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import torch

Checkpoint = dict[str, Any]
"""What a training state is kept as."""
DIGEST_BYTES = hashlib.sha256().digest_size


def packed(state: Checkpoint) -> bytes:
    """A checkpoint and its digest."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    return content + hashlib.sha256(content).digest()


def unpacked(found: bytes) -> Checkpoint:
    """The checkpoint again, in the host's memory; nothing in it is executed.

    Raises:
        ValueError: a part of it is missing or was changed.
    """
    content, digest = found[:-DIGEST_BYTES], found[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("it was damaged or cut off")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
