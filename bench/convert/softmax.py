"""How softmax layers compute while a stage trains: with their matrices kept, or without asking for a mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.convert.spec import Stage

CAUSAL = "mixer_bench_causal"
"""torch's fused attention under a name that has no mask. transformers makes the mask of `sdpa` by looking for packed
sequences in the positions, and the processor then waits for the device before every forward pass; training rows are whole."""

AttentionInterface.register(CAUSAL, sdpa_attention_forward)


@contextlib.contextmanager
def training_softmax(stage: Stage, teacher: Any, student: Any = None) -> Iterator[None]:
    """Within it, softmax layers compute as the stage needs it.

    Args:
        stage: attention matrices are captured from `eager` attention alone: fused kernels do not keep them.
        teacher: the teacher.
        student: or None where only the teacher runs from end to end.
    """
    with contextlib.ExitStack() as stack:
        for model in (teacher, None if student is None else student.lm):
            if model is None:
                continue
            if stage.capture == "attn_weights":
                stack.enter_context(_attention(model, "eager"))
            elif sees_everything(model.config, stage.seq_len):
                stack.enter_context(_attention(model, CAUSAL))
        yield


def sees_everything(config: Any, length: int) -> bool:
    """Whether every softmax layer of a model is causal and nothing else, on sequences of this length."""
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    return all(kind == "full_attention" for kind in kinds) and (window is None or window >= length)


@contextlib.contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
