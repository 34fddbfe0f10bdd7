"""The trainer: what it leaves out changes nothing, checkpoints are exact, failures are recorded honestly."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bench import runner
from bench.data import epoch_plan
from bench.grammar import named_layers
from bench.launch import Workers
from bench.model import LanguageModel
from bench.spec import ModelSpec, RunSpec, TaskSpec, TrainSpec
from bench.store import Store
from bench.train import Interrupted, Trainer, build_model, build_task, learning_rate

CPU = torch.device("cpu")
CELLS = {"vocab_size": 32, "train_cells": "16x2:64+24x3:40", "valid_cells": "16x2:32", "test_cells": "16x2:32+24x3:16"}


def spec(mixer: str = "attention", *, seed: int = 0, model: dict | None = None, **train: object) -> RunSpec:
    settings = {"lr": 1e-2, "batch_size": 16, "epochs": 3, "stop_at": None, **train}
    return RunSpec(
        task=TaskSpec(name="mqar", options=CELLS),
        model=ModelSpec(**named_layers(mixer), d_model=16, **(model or {})),
        train=TrainSpec(**settings),  # type: ignore[arg-type]
        seed=seed,
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


def test_labelled_rows_give_the_gradients_of_the_loss_over_all_positions() -> None:
    trainer = Trainer(spec(model={"embed_dropout": 0.0}), CPU)
    cell = trainer.train_cells[0]
    inputs_BT = cell.inputs.long()
    trainer.model.train()

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(trainer.model.parameters())))

    some = F.cross_entropy(trainer.model(inputs_BT, cell.rows_NM).flatten(0, 1), cell.labels_NM.flatten())
    targets_BT = torch.full_like(inputs_BT, -100).scatter(1, cell.rows_NM, cell.labels_NM)
    every = F.cross_entropy(trainer.model(inputs_BT).flatten(0, 1), targets_BT.flatten(), ignore_index=-100)
    torch.testing.assert_close(some, every)
    for one, other in zip(gradients(some), gradients(every), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_micro_batches_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for parts in (1, 3):
        trainer = Trainer(spec(model={"embed_dropout": 0.0}), CPU, micro_batches=parts)
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda set_to_none: None)
        trainer._train_step(trainer.train_cells[1], torch.arange(16))
        found.append(([p.grad for p in trainer.model.parameters()], trainer.sums))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


def test_a_seed_decides_the_run_and_the_callers_randomness_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = Trainer(spec(), CPU)
    first.run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = Trainer(spec(), CPU)
    second.run()
    other = Trainer(spec(seed=1), CPU)
    other.run()
    for key, value in weights(first).items():
        assert torch.equal(weights(second)[key], value)
    assert not torch.equal(weights(other)["embedding.weight"], weights(first)["embedding.weight"])


@pytest.mark.parametrize("stop_after", [1, 7, 8, 13])
def test_resuming_is_exact(stop_after: int) -> None:
    whole = Trainer(spec(), CPU)
    whole.run()
    part = Trainer(spec(), CPU)
    with pytest.raises(Interrupted) as stop:
        part.run(should_stop=lambda: part.step >= stop_after)
    buffer = io.BytesIO()
    torch.save(stop.value.checkpoint, buffer)
    buffer.seek(0)
    rest = Trainer(spec(), CPU)
    rest.restore(torch.load(buffer, weights_only=True))
    assert rest.step == stop_after
    rest.run()
    for key, value in weights(whole).items():
        assert torch.equal(weights(rest)[key], value), key
    timeless = [{key: value for key, value in point.items() if key != "seconds"} for point in rest.curve]
    assert timeless == [{key: value for key, value in point.items() if key != "seconds"} for point in whole.curve]


def test_a_checkpoint_of_another_run_is_refused() -> None:
    one, other = Trainer(spec(), CPU), Trainer(spec(seed=1), CPU)
    with pytest.raises(ValueError, match="another run"):
        other.restore(one.checkpoint())


def test_a_corrupt_checkpoint_is_ignored_with_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    want = runner.execute(spec(), CPU, store)
    assert want is not None
    (store.path(want.run_id) / "record.json").unlink()
    (store.path(want.run_id) / "checkpoint.pt").write_bytes(b"not a checkpoint")
    again = runner.execute(spec(), CPU, store)
    assert again is not None
    assert "Ignored" in capfd.readouterr().err
    assert again.metrics == want.metrics
    assert not (store.path(want.run_id) / "checkpoint.pt").exists()


def test_early_stop() -> None:
    trainer = Trainer(spec(stop_at=0.01, epochs=50), CPU)
    trainer.run()
    assert trainer.epoch < 50
    assert trainer.curve[-1]["valid_accuracy"] > 0.01


def test_divergence_is_a_record_with_its_reason(tmp_path: Path) -> None:
    record = runner.execute(spec(lr=1e30, weight_decay=0.0), CPU, Store(tmp_path))
    assert record is not None
    assert record.status == "diverged"
    assert "lr 1e+30" in record.reason
    assert record.metric("valid", "accuracy") is None
    assert Store(tmp_path).read(record.run_id) == record


def test_failure_is_a_record_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the mixer is\nbroken")

    monkeypatch.setattr(LanguageModel, "hidden", broken)
    record = runner.execute(spec(), CPU, Store(tmp_path))
    assert record is not None
    assert (record.status, record.reason) == ("failed", "RuntimeError: the mixer is broken")


@pytest.mark.parametrize(("fits", "status", "parts"), [(4, "done", 4), (16, "oom", 8)])
def test_out_of_memory_splits_the_batch_then_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: int, status: str, parts: int
) -> None:
    """A real out-of-memory needs a GPU that is too small, so the error is raised by hand."""
    original = Trainer._train_step

    def limited(self: Trainer, *arguments: object) -> None:
        if self.micro_batches < fits:
            raise torch.OutOfMemoryError("out of memory")
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_train_step", limited)
    record = runner.execute(spec(), CPU, Store(tmp_path))
    assert record is not None
    assert (record.status, record.micro_batches) == (status, parts)


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    with Workers(["cpu"], tmp_path) as workers:
        workers.submit(spec(epochs=100000))
        kinds = []
        while "progress" not in kinds:
            kinds += [event.kind for event in workers.events(1.0)]
        workers.workers[0].process.kill()
        while "died" not in kinds:
            kinds += [event.kind for event in workers.events(1.0)]
        assert workers.idle() == 1
    record = runner.record_death(spec(), CPU, Store(tmp_path), -9)
    assert (record.status, record.reason) == ("failed", "its worker process died twice (signal 9)")


def test_schedules() -> None:
    epoch_wise = TrainSpec(lr=1.0, epochs=4)
    assert [learning_rate(epoch_wise, step, 10) for step in (0, 9, 10, 39)] == pytest.approx(
        [1.0, 1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5 + 0.5 * math.cos(3 * math.pi / 4)]
    )
    step_wise = TrainSpec(lr=1.0, epochs=4, schedule="cosine", warmup_steps=4)
    assert learning_rate(step_wise, 0, 10) == pytest.approx(0.2)
    assert learning_rate(step_wise, 20, 10) == pytest.approx(0.5)
    assert learning_rate(TrainSpec(lr=0.3, schedule="constant"), 77, 10) == 0.3


@pytest.mark.parametrize("shuffle", ["none", "batches", "examples"])
def test_epoch_plan_covers_every_example_once_and_never_mixes_cells(shuffle: str) -> None:
    settings = spec(shuffle=shuffle)
    trainer = Trainer(settings, CPU)
    plans = [epoch_plan(trainer.train_cells, settings.train, 0, epoch) for epoch in (0, 0, 1)]
    seen = sorted((cell, int(i)) for cell, part in plans[0] for i in part)
    assert seen == [(0, i) for i in range(64)] + [(1, i) for i in range(40)]
    flat = [[(cell, part.tolist()) for cell, part in plan] for plan in plans]
    assert flat[0] == flat[1]
    assert (flat[0] == flat[2]) == (shuffle == "none")


def test_zoology_frame_has_its_quirks() -> None:
    task = build_task(TaskSpec(name="mqar", options=CELLS))
    model = build_model(spec("attention*2", model={"n_layers": 4}), task, CPU)
    x_BTD = torch.randn(2, 5, 16)
    block = model.blocks[0]
    mixed = x_BTD + block.mixer(block.norm1(x_BTD))[0]
    torch.testing.assert_close(block(x_BTD), mixed + block.norm2(mixed))
    out = torch.cat([block.mixer.out_proj.weight.flatten() for block in model.blocks])
    assert float(out.detach().std()) == pytest.approx(0.02 / math.sqrt(8), rel=0.1)
    mamba = build_model(spec("mamba2*2"), task, CPU).blocks[0]
    torch.testing.assert_close(mamba(x_BTD), x_BTD + mamba.mixer(mamba.norm1(x_BTD))[0])


def test_layers_are_cycled() -> None:
    task = build_task(TaskSpec(name="mqar", options=CELLS))
    model = build_model(spec("gla*3+attention", model={"n_layers": 8}), task, CPU)
    assert [mixer.name for mixer in model.mixers()] == ["gla", "gla", "gla", "attention"] * 2
