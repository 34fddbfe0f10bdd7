"""`bench sample`: a corpus drawn from the teacher's own distribution, saved once and used by many conversions."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.commands.console import Output, seconds_text
from bench.device import resolve_device
from bench.errors import UserError
from bench.hub import go_offline_without_hub
from bench.store import atomic_write

if TYPE_CHECKING:
    import numpy as np


def run(
    model: str, out: Path, tokens: int, length: int, batch: int, temperature: float, seed: int, device: str, output: Output
) -> int:
    """Samples texts that start from nothing, and writes `tokens.npy` and `sample.json` into a new folder.

    Args:
        model: the teacher.
        out: the folder.
        tokens: how many.
        length: of a text, in tokens.
        batch: texts at a time.
        temperature: 0 is greedy.
        seed: of the draws.
        device: auto, cpu, cuda or cuda:0.
        output: where progress goes.

    Returns:
        The exit code 0.

    Raises:
        UserError: the folder holds a corpus already, or the model cannot be loaded.
    """
    if (out / "tokens.npy").exists():
        raise UserError(f"{out} holds a corpus already; choose another --out.")
    resolved = resolve_device(device)
    if not Path(model).exists():
        go_offline_without_hub()
    import numpy as np
    import torch

    from bench import pretrained

    dtype = torch.bfloat16 if resolved.kind != "cpu" else None
    teacher: Any
    teacher, tokenizer = pretrained.load(model, dtype=dtype, device=resolved.kind)
    start: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError(f"The tokenizer of {model} has no token that begins a text; sampling needs bos or eos.")
    torch.manual_seed(seed)
    draw = partial(_drawn, teacher, start, tokenizer.pad_token_id, batch, length, temperature)
    corpus = np.concatenate(list(_texts(draw, tokens, output)))[:tokens]
    buffer = io.BytesIO()
    np.save(buffer, corpus, allow_pickle=False)
    facts = {
        "model": model,
        "vocab_size": teacher.config.vocab_size,
        "tokens": len(corpus),
        "length": length,
        "temperature": temperature,
        "seed": seed,
        "sha256": hashlib.sha256(corpus.tobytes()).hexdigest(),
    }
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "sample.json", (json.dumps(facts, indent=1) + "\n").encode())
    atomic_write(out / "tokens.npy", buffer.getvalue())
    output.emit("sampled", facts)
    output.say(f"Wrote {len(corpus):,} tokens to {out}; use them with --data corpus:{out}.")
    return 0


def _texts(draw: Callable[[], np.ndarray], tokens: int, output: Output) -> Iterator[np.ndarray]:
    """Draws until there are so many tokens, and says how far it is."""
    began, found = time.monotonic(), 0
    while found < tokens:
        texts = draw()
        found += texts.size
        rate = found / (time.monotonic() - began)
        output.say(f"{found:,}/{tokens:,} tokens, {rate:,.0f} tokens/s, {seconds_text(max(0, tokens - found) / rate)} left")
        yield texts


def _drawn(teacher: Any, start: int, padding: Any, batch: int, length: int, temperature: float) -> np.ndarray:
    """Texts of one draw one after the other, each with its starting token: int32 [batch * (1 + length)]."""
    import numpy as np
    import torch

    first = torch.full((batch, 1), start, device=teacher.device)
    drawn = teacher.generate(
        first,
        attention_mask=torch.ones_like(first),
        min_new_tokens=length,
        max_new_tokens=length,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0 if temperature > 0 else None,
        top_p=None,
        pad_token_id=padding,
    )
    return drawn.cpu().numpy().astype(np.int32).reshape(-1)
