"""Stages on the teacher's own stream: every converted layer learns from what the teacher's layer saw and said.

Layers do not depend on each other there, so each runs backward as soon as the teacher's layer has run: one forward pass
of the teacher serves all layers and memory holds the graph of one.

Shape legend: B batch, T time, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.convert.losses import layer_loss, weights_loss
from bench.convert.spec import Stage
from bench.convert.student import LinearizedForCausalLM
from bench.errors import UserError


def alignment_backward(student: LinearizedForCausalLM, teacher: Any, tokens_BT: Tensor, stage: Stage, factor: float) -> Tensor:
    """Adds the gradient of the stage's layer loss, a mean over converted layers, times `factor`.

    Args:
        student: whose converted layers learn.
        teacher: whose stream they see.
        tokens_BT: int64.
        stage: what is captured and how it is compared.
        factor: on loss and gradient.

    Returns:
        The loss times `factor`, a number on the device.

    Raises:
        UserError: keys are to be scored, and no layer scores any.
    """
    layers = student.converted()
    if stage.capture == "far_attention":
        layers = {index: layer for index, layer in layers.items() if layer.scores_keys}
    if not layers:
        raise UserError("A stage that captures far_attention trains scores of keys; set plan.far_heads and plan.far_keys=best.")
    losses: list[Tensor] = []

    def learn(loss: Tensor) -> None:
        scaled = loss * (factor / len(layers))
        scaled.backward()
        losses.append(scaled.detach())

    handles = [handle for index in layers for handle in _hooks(student, teacher, index, stage, learn)]
    try:
        with torch.no_grad():
            teacher.model(input_ids=tokens_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(losses).sum()


def _hooks(student: LinearizedForCausalLM, teacher: Any, index: int, stage: Stage, learn: Callable[[Tensor], None]) -> list[Any]:
    """The hooks on one teacher layer that capture its input and output and train the student's."""
    block = teacher.model.layers[index]
    layer = student.converted()[index]
    heads: dict[str, Tensor] = {}

    def before_o_proj(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        heads["output"] = args[0]

    def after_attention(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Tensor | None]) -> None:
        x_BTD, rope = kwargs.get("hidden_states", args[0] if args else None), kwargs["position_embeddings"]
        assert x_BTD is not None
        rope = tuple(a.expand(len(x_BTD), -1, -1) for a in rope)
        with torch.enable_grad():
            if stage.capture == "attn_weights":
                assert output[1] is not None
                learn(weights_loss(stage.loss, layer.matrix(x_BTD, rope), output[1]))
            elif stage.capture == "attn_out":
                learn(layer_loss(stage.loss, layer.heads_output(x_BTD, rope), heads.pop("output")))
            elif stage.capture == "far_attention":
                learn(layer.score_loss(x_BTD, rope))
            else:
                learn(layer_loss(stage.loss, layer.segment(x_BTD, rope, None)[0], output[0]))

    def after_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with torch.enable_grad():
            produced = student.blocks()[index](*args, **kwargs)
            learn(layer_loss(stage.loss, _hidden(produced), _hidden(output)))

    if stage.capture == "block_out":
        return [block.register_forward_hook(after_block, with_kwargs=True)]
    handles = [block.self_attn.register_forward_hook(after_attention, with_kwargs=True)]
    if stage.capture == "attn_out":
        handles.append(block.self_attn.o_proj.register_forward_pre_hook(before_o_proj))
    return handles


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
