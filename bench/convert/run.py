"""A conversion from teacher to finished folder: stages, checkpoints, the choice of kept layers, the gate, the report."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from bench import __version__, provenance
from bench.convert import parallel, saving
from bench.convert.align import alignment_backward
from bench.convert.compiled import WORTH_COMPILING
from bench.convert.data import TrainingData
from bench.convert.far import automatic
from bench.convert.gate import STEPS, GateResult, check_model
from bench.convert.loop import Progress, StageLoop
from bench.convert.measure import agreement, cache_bytes, referee_rows
from bench.convert.parameters import choose_parameters
from bench.convert.plans import kl_kept, layer_plans
from bench.convert.retrieval import SHORT, Search, find_far_heads
from bench.convert.softmax import training_softmax
from bench.convert.spec import LayerPlan, Recipe, Stage
from bench.convert.stage import StageTrainer, products_like_tf32
from bench.convert.student import build_student
from bench.errors import UserError
from bench.spec import digest

GATE_ROWS = 3
CHECKPOINT_SECONDS = 120.0
LAYER_SCORE_ROWS = 2
"""Held-out sequences on which the layers of a kl:n plan are ranked."""


@dataclass
class Conversion:
    """A conversion that is about to run, or to go on.

    Args:
        teacher: in fp32, frozen.
        tokenizer: its tokenizer.
        recipe: resolved; token budgets are already scaled.
        data: training and held-out text.
        out: the folder to make.
        model: the teacher as the user named it.
        precision: "fp32" or "bf16" autocast.
        seconds: time for all stages, or None.
        store_dtype: of the saved weights.
        held_rows: held-out sequences of the report.
    """

    teacher: Any
    tokenizer: Any
    recipe: Recipe
    data: TrainingData
    out: Path
    model: str
    precision: str
    seconds: float | None
    store_dtype: torch.dtype
    held_rows: int
    log: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device: torch.device = self.teacher.device
        self.stages = [stage for stage in self.recipe.stages if self._applies(stage)]
        self.held = self.data.held_out(self.held_rows, self._length())
        self._find_far_heads()
        torch.manual_seed(self.recipe.seed)
        self.student = build_student(self.teacher, layer_plans(self.recipe.plan, len(self.teacher.model.layers))).eval()
        self._rehearse()
        self.data_hash = self.data.digest()

    def identity(self) -> str:
        """What decides the result; a checkpoint continues only under the same."""
        recipe = self.recipe.model_dump(mode="json", exclude={"summary"})
        return digest([self.model, recipe, self.data_hash, self.precision, self.seconds])

    def run(
        self,
        *,
        on_progress: Callable[[Progress], None] = lambda _: None,
        say: Callable[[str], None] = lambda _: None,
        checkpoint_seconds: float | None = None,
    ) -> GateResult | None:
        """Trains, checks and saves; continues from a checkpoint if one is there.

        Returns:
            The result of the gate, or None on all processes but the first.

        Raises:
            UserError: out of memory, or a checkpoint of another conversion.
            KeyboardInterrupt: after the checkpoint is stored.
        """
        every = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds
        check_transplant(self.teacher, self.held)
        restored = saving.load_checkpoint(self.out, self.identity(), self.device)
        first = 0
        if restored is None:
            self.rows["student before training"] = self._agreement(self.student)
        else:
            first, self.log, self.rows = restored["stage"], restored["log"], restored["rows"]
            self._rebuild(restored["kept"])
            say(f"Continues stage {first + 1} of {len(self.stages)} from its checkpoint.")
        for index in range(first, len(self.stages)):
            if self._must_choose(index, restored):
                self._choose_layers(say)
            self._train(index, restored, on_progress, every)
            restored = None
        gate = self._finish(say) if parallel.rank() == 0 else None
        parallel.wait()
        return gate

    def _find_far_heads(self) -> None:
        """Names the heads of an auto:n plan, so that everything after, the saved recipe too, knows them by name."""
        plan, count = self.recipe.plan, automatic(self.recipe.plan)
        if count and plan.layers.strip() != "none":
            search = SHORT if self.device.type == "cpu" else Search()
            measure = partial(find_far_heads, bf16=self.precision == "bf16", search=search)
            named, gates = measure(self.teacher, self.tokenizer, self.data, plan, count)
            self.recipe = self.recipe.model_copy(update={"plan": plan.model_copy(update={"far_heads": named})})
            self.rows["gates of key heads between window and whole attention"] = gates

    def _rehearse(self) -> None:
        """Stages on the teacher's stream see a few tokens, so that a mixer that does not fit says it before anything is written."""
        for stage in self.stages:
            if stage.capture != "logits":
                choose_parameters(self.student, self.teacher, stage)
                with training_softmax(stage, self.teacher):
                    alignment_backward(self.student, self.teacher, self.held[:1, :8].to(self.device), stage, 1.0)
                self.student.zero_grad(set_to_none=True)

    def _applies(self, stage: Stage) -> bool:
        """The teacher's control run (`--layers none`) has no converted layer to align."""
        return self.recipe.plan.layers.strip() != "none" or stage.capture == "logits"

    def _length(self) -> int:
        longest = max((stage.seq_len for stage in self.recipe.stages), default=1024)
        return min(longest, 1024, self.teacher.config.max_position_embeddings)

    def _agreement(self, model: Any) -> dict[str, float]:
        return agreement(model, self.teacher, self.held, bf16=self.precision == "bf16")

    def _train(
        self,
        index: int,
        restored: dict[str, Any] | None,
        on_progress: Callable[[Progress], None],
        checkpoint_seconds: float,
    ) -> None:
        stage = self.stages[index]
        torch.manual_seed(self.recipe.seed + index)
        compiled = self.device.type == "cuda" and stage.tokens >= WORTH_COMPILING and parallel.size() == 1
        trainer = StageTrainer(self.student, self.teacher, stage, index, self.data, self.precision, compiled=compiled)
        elapsed = 0.0
        if restored is not None:
            trainer.restore(restored["trainer"])
            elapsed = restored["elapsed"]
        limit = None if self.seconds is None else self.seconds * stage.tokens / sum(s.tokens for s in self.stages)
        save = partial(self._checkpoint, index, trainer)
        with training_softmax(stage, self.teacher, trainer.student), products_like_tf32(self.precision == "bf16"):
            loop = StageLoop(trainer, len(self.stages), limit, elapsed, on_progress, save, checkpoint_seconds)
            self.log.append(loop.run())
        trainer.finish()
        self.rows[f"student after stage {index + 1}"] = self._agreement(self.student)

    def _checkpoint(self, index: int, trainer: StageTrainer, elapsed: float) -> None:
        state = trainer.state()
        if parallel.rank():
            return
        content = {
            "identity": self.identity(),
            "stage": index,
            "trainer": state,
            "elapsed": elapsed,
            "log": self.log,
            "rows": self.rows,
            "kept": [layer for layer, plan in enumerate(self.student.plans) if plan is None],
        }
        saving.save_checkpoint(self.out, content)

    def _must_choose(self, index: int, restored: dict[str, Any] | None) -> bool:
        """A kl:n plan is settled once layers are aligned: before the first stage that runs the student end to end."""
        if restored is not None or not kl_kept(self.recipe.plan, len(self.student.plans)):
            return False
        return self.stages[index].capture == "logits" and all(plan is not None for plan in self.student.plans)

    def _choose_layers(self, say: Callable[[str], None]) -> None:
        """Keeps the softmax layers whose return alone lowers the KL most (fla-org/hybrid-distillation 2026)."""
        rows = self.held[:LAYER_SCORE_ROWS]
        converted = self.student.converted()
        score: dict[int, float] = {}
        for layer, module in converted.items():
            self.student.blocks()[layer].self_attn = self.teacher.model.layers[layer].self_attn
            score[layer] = agreement(self.student, self.teacher, rows, bf16=self.precision == "bf16")["kl"]
            self.student.blocks()[layer].self_attn = module
        kept = sorted(sorted(score, key=lambda layer: score[layer])[: kl_kept(self.recipe.plan, len(score))])
        self.rows["kl when a layer is restored"] = {str(layer): value for layer, value in score.items()}
        say(f"Keeps softmax in layers {', '.join(map(str, kept))}: each alone lowers the KL most.")
        self._rebuild(kept)

    def _rebuild(self, kept: list[int]) -> None:
        """The student again with softmax in the kept layers, its other layers as they are."""
        if kept == [layer for layer, plan in enumerate(self.student.plans) if plan is None]:
            return
        plans: list[LayerPlan | None] = [None if layer in kept else self.recipe.plan for layer in range(len(self.student.plans))]
        trained = self.student.state_dict()
        again = build_student(self.teacher, plans).eval()
        restored = {f"layers.{layer}.self_attn." for layer in kept}
        again.load_state_dict(
            {name: tensor for name, tensor in trained.items() if not any(part in name for part in restored)}, strict=False
        )
        self.student = again

    def _finish(self, say: Callable[[str], None]) -> GateResult:
        folder = saving.partial_folder(self.out) / "finished"
        trained = sum(entry["tokens"] for entry in self.log)
        facts = {
            "recipe_name": self.recipe.name,
            "recipe_hash": digest(self.recipe.model_dump(mode="json", exclude={"summary"})),
            "recipe": self.recipe.model_dump(mode="json"),
            "teacher": self.model,
            "teacher_source": getattr(self.teacher.config, "source", None),
            "data_hash": self.data_hash,
            "tokens": trained,
            "seed": self.recipe.seed,
            "mixer_bench": __version__,
        }
        self.student.eval().requires_grad_(False)
        saving.write_model(folder, self.student, self.tokenizer, self.store_dtype, facts)
        say("Checks the checkpoint: parallel, chunked, step by step, left-padded, batched, reloaded.")
        gate = check_model(self.student, gate_tokens(self.held), folder=folder)
        constant, growth = cache_bytes(self.student)
        _, teacher_growth = cache_bytes(self.teacher)
        self.rows |= referee_rows(self.student, self.teacher, self.held, bf16=self.precision == "bf16")
        report = {
            **{key: value for key, value in facts.items() if key != "recipe"},
            "gate": {"passed": gate.passed, **asdict(gate)},
            "state_bytes": {"constant": constant, "per_token": growth, "teacher_per_token": teacher_growth},
            "held_out": {"tokens": self.held.numel(), "rows": self.rows},
            "stages": self.log,
            "parameters": sum(parameter.numel() for parameter in self.student.parameters()),
            "precision": self.precision,
            "device": str(self.device),
            "hardware": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else provenance.cpu_name(),
            "commit": provenance.git_state()[0],
            "command": os.environ.get("BENCH_COMMAND", ""),
            "versions": {**provenance.versions(), "transformers": transformers.__version__},
        }
        saving.write_json(folder / "report.json", report)
        if gate.passed:
            saving.publish(folder, self.out)
        return gate


def gate_tokens(held_BT: torch.Tensor) -> torch.Tensor:
    """Rows for the gate, long enough that tokens leave a usual window and short enough for a CPU."""
    rows = held_BT[:GATE_ROWS] if len(held_BT) >= GATE_ROWS else held_BT.repeat(GATE_ROWS, 1)[:GATE_ROWS]
    return rows[:, : max(2 * STEPS, min(rows.shape[1], 256))]


@torch.no_grad()
def check_transplant(teacher: Any, held_BT: torch.Tensor) -> None:
    """Proves that our reading of the teacher's attention is right: with a window over everything, nothing may change.

    Raises:
        UserError: the attention computes something else than softmax(q.k) v with plain rotary positions.
    """
    tokens = held_BT[:1, :64].to(teacher.device)
    whole = LayerPlan(mixer=None, window=4096, combine="sum")
    unchanged = build_student(teacher, [whole] * len(teacher.model.layers)).eval()
    wanted, found = (model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1) for model in (teacher, unchanged))
    worst = float((wanted - found).abs().max())
    if not worst < 1e-2:
        name = type(teacher.model.layers[0].self_attn).__name__
        raise UserError(
            f"The attention of this model ({name}, layer 0) computes something else than softmax attention with rotary positions: "
            f"taken over unchanged, its log-probabilities move by {worst:.2g}. It cannot be converted faithfully."
        )


def scaled(recipe: Recipe, tokens: int | None) -> Recipe:
    """A recipe whose stages share a token budget in the published proportion."""
    if tokens is None or not recipe.stages:
        return recipe
    factor = tokens / recipe.tokens()
    stages = tuple(stage.model_copy(update={"tokens": max(1, round(stage.tokens * factor))}) for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages})
