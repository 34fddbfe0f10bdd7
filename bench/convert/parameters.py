"""Which parameters of a student a stage trains: named groups, and adapters."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from bench.convert.spec import Group, Stage
from bench.convert.student import LinearizedForCausalLM
from bench.errors import UserError


def choose_parameters(student: LinearizedForCausalLM, teacher: Any, stage: Stage) -> list[tuple[float, dict[str, nn.Parameter]]]:
    """Freezes all but the stage's groups and adapters.

    Returns:
        Learning rates with the parameters they apply to; the mixers' own rate comes first where it differs.

    Raises:
        UserError: no parameter would train.
    """
    known = {name for name, _ in teacher.named_parameters()}
    fresh: dict[str, nn.Parameter] = {}
    rest: dict[str, nn.Parameter] = {}
    for name, parameter in student.named_parameters():
        adapter = "lora_" in name
        group = parameter_group(name, known)
        trains = adapter or "all" in stage.train or group in stage.train
        if stage.capture != "logits" and not adapter:
            trains = trains and _in_aligned_layer(student, name, stage)
        parameter.requires_grad_(trains)
        if trains:
            (fresh if group == "mixer" and not adapter else rest)[name] = parameter
    if not fresh and not rest:
        raise UserError(
            f"A stage that trains {', '.join(stage.train) or 'adapters only'} finds nothing to train in this student; "
            'name another group with --set stages.train, for example ["qkv","o"].'
        )
    groups = [(stage.mixer_lr or stage.lr, fresh), (stage.lr, rest)]
    return [(lr, params) for lr, params in groups if params]


def parameter_group(name: str, teacher_names: set[str]) -> Group:
    """The group of a student's parameter; `mixer` is what the teacher does not have."""
    plain = name.removeprefix("lm.").replace(".base_layer.", ".")
    if plain not in teacher_names:
        return "mixer"
    part = plain.split(".")[-2]
    if ".self_attn." in plain:
        return "o" if part == "o_proj" else "qkv"
    if ".mlp." in plain:
        return "mlp"
    return "norms" if "norm" in part else "embeddings"


def _in_aligned_layer(student: LinearizedForCausalLM, name: str, stage: Stage) -> bool:
    """Whether a parameter takes part in the loss of a captured layer; others would have no gradient."""
    pieces = name.split(".")
    if "layers" not in pieces:
        return False
    index = int(pieces[pieces.index("layers") + 1])
    if student.plans[index] is None:
        return False
    if stage.capture == "block_out":
        return True
    return ".self_attn." in name and not (stage.capture in ("attn_out", "attn_weights") and ".o_proj." in name)


def add_adapters(student: LinearizedForCausalLM, stage: Stage) -> Any:
    """Puts LoRA adapters into the student, in place; returns PEFT's tuner, which merges them later, or None."""
    if stage.lora is None:
        return None
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    lora = stage.lora
    config = LoraConfig(r=lora.rank, lora_alpha=cast(int, lora.alpha), lora_dropout=lora.dropout, target_modules=list(lora.targets))
    try:
        return LoraModel(student, config, "default")
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, module in student.named_modules() if isinstance(module, nn.Linear)})
        raise UserError(
            f"No layer of the student is named {', '.join(lora.targets)}; linear layers are {', '.join(names)}: name some with "
            "--set stages.lora.targets."
        ) from error
