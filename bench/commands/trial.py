"""What training would stumble over and building does not show: one example of every cell, a few tokens through every mixer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from bench.errors import UserError
from bench.spec import LayerSpec, ModelSpec, TaskSpec

if TYPE_CHECKING:
    from bench.model import LanguageModel
    from synthetic_tasks import Task

TOKENS = 16
"""Of a trial: options are refused whatever the length, but for `max_len`."""
MOST_TOKENS = 1 << 12
"""Of a trial of `max_len`: some mixers take time that grows with the square, and heed it only with some other option."""
MOST_PARAMETERS = 1 << 24
"""Of a mixer that is tried: drawing more takes a second and the memory that a plan on a small machine may lack."""

T = TypeVar("T")


def is_outside(name: str) -> bool:
    """Whether a mixer is of a loose file or another package, by its name."""
    return "@" in name or "/" in name


class Trials:
    """What was tried already: plans ask for one task or mixer many times."""

    def __init__(self) -> None:
        self.tasks: set[TaskSpec] = set()
        self.mixers: set[tuple[LayerSpec, int, int]] = set()

    def task(self, spec: TaskSpec, task: Task) -> None:
        """Draws an example of every cell, and asks for all that a record says of a task.

        Raises:
            UserError: the task fails at either, or a split has no cells.
        """
        from bench.outcome import cell_info
        from synthetic_tasks import SPLITS, stream

        if spec in self.tasks:
            return
        for split in SPLITS:
            cells = _tried(spec.name, f"the cells of the {split} split", partial(task.cells, split))
            if not cells:
                raise UserError(f"Task {spec.name} has no cells in its {split} split; every split needs at least one.")
            for cell in cells:
                draw = partial(task.sample, cell, 1, stream(0, "trial", split, cell.name))
                _tried(spec.name, f"an example of its {split} cell {cell.name!r}", draw)
        for cell in task.cells("test"):
            _tried(spec.name, f"the ceilings and bits of its test cell {cell.name!r}", partial(cell_info, task, cell))
        self.tasks.add(spec)

    def zoo(self, spec: ModelSpec, model: LanguageModel, longest: int) -> None:
        """Runs the zoo's mixers on a few tokens; those from outside meet the contract, which does that and more.

        Args:
            spec: the model.
            model: the same, on any device.
            longest: length of the task's longest sequence.

        Raises:
            UserError: a mixer refuses to compute with its options.
        """
        for index, built in zip(range(len(spec.layers)), model.mixers(), strict=False):
            layer = spec.layer(index)
            trial = layer, spec.d_model, _tokens(layer, longest)
            large = sum(p.numel() for p in built.parameters()) > MOST_PARAMETERS
            if not large and not is_outside(layer.mixer) and trial not in self.mixers:
                _run(*trial, index)
                self.mixers.add(trial)


def _tokens(layer: LayerSpec, longest: int) -> int:
    """Tokens of a mixer's trial: one more than an option `max_len` allows, where the task has longer sequences."""
    allowed = layer.options.get("max_len", longest)
    if isinstance(allowed, int) and allowed < longest and allowed < MOST_TOKENS:
        return max(1, allowed + 1)
    return min(TOKENS, longest)


def _run(layer: LayerSpec, d_model: int, tokens: int, index: int) -> None:
    import torch

    from bench.model import build_mixer

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        mixer = build_mixer(layer, d_model, index, tokens)
        try:
            mixer(torch.zeros(1, tokens, d_model))
        except Exception as error:
            raise UserError(
                f"Mixer {layer.label()} at d_model={d_model} cannot compute {tokens} tokens with these options: {_words(error)}."
            ) from error


def _tried(name: str, what: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:
        raise UserError(f"Task {name} cannot give {what}: {_words(error)}; change its options or mend its file.") from error


def _words(error: Exception) -> str:
    """An error in a line; of pydantic's many, the first one without its address."""
    if isinstance(error, ValidationError):
        first: Any = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": .")
