"""The training protocol that the figures of Based and of Zoology's README share: one model on a mixture of five MQAR cells."""

from __future__ import annotations

from collections.abc import Iterable

from bench.grammar import named_layers
from bench.spec import ModelSpec, TaskSpec, TrainSpec
from bench.sweep import Experiment

LRS = (1e-3, 10**-2.5, 1e-2, 10**-1.5)
"""Learning rates of the published sweeps, logspace(-3, -1.5, 4)."""

VALID_CELLS = "64x4:200+64x8:200+64x16:200+128x32:200+256x64:200+512x128:200+1024x256:200"
MIXTURE = TaskSpec(name="mqar", options={"protocol": "based_figure2", "valid_cells": VALID_CELLS})
"""The published mixture; validation draws of our own on the seven test cells choose the learning rate and stop training."""

TRAIN = TrainSpec(batch_size=256, epochs=32, weight_decay=0.1, schedule="cosine_epoch", shuffle="none", stop_at=0.99)

SLIDING = tuple((f"sliding_window:window={window + 1}", 128) for window in (8, 16, 32, 64, 128, 256, 512, 1024))
"""The published window w sees w + 1 keys."""

Model = tuple[str, int]
"""A mixer expression and a width."""


def mixture(models: Iterable[Model], task: TaskSpec = MIXTURE) -> tuple[Experiment, ...]:
    """An experiment for each model, in Zoology's frame with two layers."""
    return tuple(
        Experiment(task=task, model=ModelSpec(**named_layers(mixer), d_model=width), train=TRAIN, lrs=LRS)
        for mixer, width in models
    )
