"""Compiling the repeated parts of student and teacher: one block's code serves all layers, so a stage compiles in seconds.

The stages run narrow models on many tokens, where norms, gates and rotations cost more than matrix products; the compiler
fuses them. Which parts can be compiled depends on what the stage looks at in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.convert.spec import Stage

WORTH_COMPILING = 3_000_000
"""Tokens of a stage below which compiling costs more than it saves."""


def compile_parts(student: Any, teacher: Any, stage: Stage, *, backend: str = "inductor") -> Callable[[], None]:
    """Compiles what the stage runs, in place.

    Args:
        student: the student.
        teacher: the teacher.
        stage: which of their parts run, and where hooks look into the teacher.
        backend: of torch.compile.

    Returns:
        A function that takes the compiled code out again.
    """
    settings: dict[str, Any] = {"backend": backend, "dynamic": False}
    modules: list[nn.Module] = []
    undo: list[Callable[[], None]] = []
    if stage.capture == "logits":
        modules += [*student.blocks(), *teacher.model.layers]
    else:
        for block in teacher.model.layers:
            modules += [part for name, part in block.named_children() if name != "self_attn"]
        if stage.capture == "block_out":
            modules += [student.blocks()[index] for index in student.converted()]
    for module in modules:
        module.compile(**settings)
        undo.append(lambda module=module: setattr(module, "_compiled_call_impl", None))
    method = {"attn_out": "heads_output", "mixer_out": "segment"}.get(stage.capture, "")
    for layer in student.converted().values() if method else ():
        # an attribute of the instance hides the method until it is deleted
        setattr(layer, method, torch.compile(getattr(layer, method), **settings))
        undo.append(lambda layer=layer: delattr(layer, method))

    def restore() -> None:
        for step in undo:
            step()

    return restore
