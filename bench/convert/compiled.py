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

WORTH_COMPILING = 1_000_000
"""Tokens of a stage below which compiling, some ten seconds, costs more than it saves."""


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
    modules, methods = _parts(student, teacher, stage)
    settings: dict[str, Any] = {"backend": backend, "dynamic": False}
    undo = [_room_for_variants(len(modules) + len(methods))]
    for module in modules:
        module.compile(**settings)
        undo.append(lambda module=module: setattr(module, "_compiled_call_impl", None))
    for module, method in methods:
        # an attribute of the instance hides the method until it is deleted
        setattr(module, method, torch.compile(getattr(module, method), **settings))
        undo.append(lambda module=module, method=method: delattr(module, method))

    def restore() -> None:
        for step in undo:
            step()

    return restore


def _room_for_variants(parts: int) -> Callable[[], None]:
    """Lets every part have code of its own, for a whole and a last, smaller batch; returns what takes that back.

    Layers that differ, as in which of their heads look far, share a function but not its code, and what exceeds torch's limit of
    variants, 8, would run uncompiled from then on.
    """
    config: Any = torch._dynamo.config
    before = config.recompile_limit
    config.recompile_limit = max(before, 2 * parts)
    return lambda: setattr(config, "recompile_limit", before)


def _parts(student: Any, teacher: Any, stage: Stage) -> tuple[list[nn.Module], list[tuple[nn.Module, str]]]:
    """Modules that are compiled whole, and methods: hooks of the module, which belong to the stage, stay outside of those."""
    if stage.capture == "logits":
        return [*student.blocks(), *teacher.model.layers], []
    layers = student.converted()
    if stage.capture == "block_out":
        return [student.blocks()[index] for index in layers], [(block, "forward") for block in teacher.model.layers]
    modules = [part for block in teacher.model.layers for name, part in block.named_children() if name != "self_attn"]
    if stage.capture == "mixer_out":
        attentions = [(block.self_attn, "forward") for block in teacher.model.layers]
        return modules, [*attentions, *((layer, "segment") for layer in layers.values())]
    # What attn_out captures lies inside of the teacher's attention.
    return modules, [(layer, "heads_output") for layer in layers.values()] if stage.capture == "attn_out" else []
