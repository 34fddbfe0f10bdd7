"""The trainer: what it leaves out or does together changes nothing, checkpoints are exact, failures are recorded honestly."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench import runner, streamed
from bench.build import build_model, build_task
from bench.data import device_split, epoch_plan
from bench.fleet import Fleet
from bench.grammar import named_layers
from bench.launch.local import LocalWorkers
from bench.member import learning_rate
from bench.model import LanguageModel
from bench.outcome import identity_of
from bench.records import RunRecord
from bench.spec import ModelSpec, RunSpec, TaskSpec, TrainSpec
from bench.store import Store
from bench.train import FleetTrainer, Interrupted
from synthetic_tasks import _splits
from tests.unit.plain_trainer import train_plainly

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


def weights(trainer: FleetTrainer, index: int = 0) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.fleet.model.member(index).state_dict().items()}


def finish(trainer: FleetTrainer) -> list[tuple[dict[str, torch.Tensor], list[dict]]]:
    """Trains to the end; each member's weights and curve without times, in the order of its specs."""
    specs, found = [member.spec for member in trainer.members], {}
    for index in trainer.run():
        member = trainer.members[index]
        curve = [{key: value for key, value in point.items() if key != "seconds"} for point in member.curve]
        found[member.spec] = weights(trainer, index), curve
    return [found[spec] for spec in specs]


def test_labelled_rows_give_the_gradients_of_the_loss_over_all_positions() -> None:
    run = spec(model={"embed_dropout": 0.0})
    task = build_task(run.task)
    model, cell = build_model(run, task, CPU), device_split(task, "train", 0, CPU)[0]
    inputs_BT = cell.inputs.long()

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    some = F.cross_entropy(model(inputs_BT, cell.rows_NM).flatten(0, 1), cell.labels_NM.flatten())
    targets_BT = torch.full_like(inputs_BT, -100).scatter(1, cell.rows_NM, cell.labels_NM)
    every = F.cross_entropy(model(inputs_BT).flatten(0, 1), targets_BT.flatten(), ignore_index=-100)
    torch.testing.assert_close(some, every)
    for one, other in zip(gradients(some), gradients(every), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "mixer", ["attention", "gla:n_heads=2", "mamba", "hax:keys=hax:budget=6*2", "based:feature_dim=4", "hyena"]
)
def test_a_fleet_equals_its_members_trained_plainly(mixer: str) -> None:
    """Against one module, one optimiser and one batch after another; also a fleet of one, which is not mapped."""
    fleet = [spec(mixer, seed=seed, lr=lr, shuffle="examples") for seed in (0, 3) for lr in (1e-3, 4e-3)]
    together = finish(FleetTrainer(fleet, CPU))
    (alone,) = finish(FleetTrainer(fleet[:1], CPU))
    for run, (got, curve) in zip([*fleet, fleet[0]], [*together, alone], strict=True):
        want, losses = train_plainly(run)
        assert [point["train_loss"] for point in curve] == pytest.approx(losses, rel=1e-5)
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=2e-4, msg=key)


def test_a_member_does_not_depend_on_its_neighbours() -> None:
    """A neighbour that diverges, one that stops early, and different company: the curve stays the same."""
    run = spec(stop_at=0.3, epochs=4)
    wild = run.model_copy(update={"train": run.train.model_copy(update={"lr": 1e30, "weight_decay": 0.0})})
    (_, alone), *_ = finish(FleetTrainer([run, spec(stop_at=0.3, epochs=4, seed=5)], CPU))
    for company in ([run, wild], [run, spec(stop_at=0.3, epochs=4, seed=7, lr=0.1), wild.model_copy(update={"seed": 2})]):
        (_, curve), *others = finish(FleetTrainer(list(company), CPU))
        assert len(others) == len(company) - 1
        for point, want in zip(curve, alone, strict=True):
            assert point == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_micro_batches_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for parts in (1, 3):
        trainer = FleetTrainer([spec(), spec(seed=1)], CPU, micro_batches=parts)
        fleet = trainer.fleet
        monkeypatch.setattr(fleet, "_optimise", lambda: None)
        fleet.examples_SB[:] = torch.arange(16)
        fleet.examples_SB[1, 11:] = -1
        fleet.step_on(trainer.train_cells[1])
        found.append((fleet.gradient_EP, fleet.sums_E3))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)
    assert found[0][1][:, 2].tolist() == [16, 11]


def test_a_seed_decides_the_run_and_the_callers_randomness_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ((first, _),) = finish(FleetTrainer([spec()], CPU))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    ((second, _),) = finish(FleetTrainer([spec()], CPU))
    ((other, _),) = finish(FleetTrainer([spec(seed=1)], CPU))
    for key, value in first.items():
        assert torch.equal(second[key], value)
    assert not torch.equal(other["embedding.weight"], first["embedding.weight"])


@pytest.mark.parametrize("stop_after", [1, 7, 8, 13])
def test_resuming_is_exact_and_works_in_another_fleet(stop_after: int) -> None:
    pair = [spec(), spec(seed=1)]
    whole = finish(FleetTrainer(pair, CPU))
    part = FleetTrainer(pair, CPU)
    with pytest.raises(Interrupted) as stop:
        list(part.run(should_stop=lambda: part.step >= stop_after))
    buffer = io.BytesIO()
    torch.save(stop.value.checkpoints, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    rest = FleetTrainer(pair, CPU, checkpoints=saved)
    assert rest.step == stop_after
    for (want, want_curve), (got, curve) in zip(whole, finish(rest), strict=True):
        assert curve == want_curve
        for key, value in want.items():
            assert torch.equal(got[key], value), key
    ((alone, curve),) = finish(FleetTrainer(pair[1:], CPU, checkpoints=saved[1:]))
    assert [point["train_loss"] for point in curve] == pytest.approx([point["train_loss"] for point in whole[1][1]], rel=1e-5)
    assert alone.keys() == whole[1][0].keys()


def test_a_checkpoint_of_another_run_is_refused() -> None:
    one, other = spec(), spec(seed=1)
    with pytest.raises(ValueError, match="another run"):
        FleetTrainer([other], CPU, checkpoints=FleetTrainer([one], CPU).checkpoints())


def execute(store: Path, *runs: RunSpec) -> list[RunRecord]:
    found: list[RunRecord] = []

    def tell(kind: str, content: Any) -> None:
        if kind == "record":
            found.append(content)
        elif kind == "note":
            print(content)

    assert runner.execute(list(runs), CPU, Store(store), tell=tell)
    return found


def test_members_are_ordinary_records(tmp_path: Path) -> None:
    first, second = execute(tmp_path, spec(), spec(seed=1))
    assert Store(tmp_path).load()[0] in ([first, second], [second, first])
    assert (first.fleet_size, first.execution) == (2, "eager")
    assert first.train_seconds == pytest.approx(second.train_seconds)
    assert first.metric("test", "accuracy") is not None
    assert Store(tmp_path).curve(second.run_id) is not None


def test_members_stopped_at_different_steps_go_on(tmp_path: Path) -> None:
    pair = [spec(), spec(seed=1)]
    want = execute(tmp_path / "whole", *pair)
    for run, after in zip(pair, (3, 9), strict=True):
        trainer = FleetTrainer([run], CPU)
        with pytest.raises(Interrupted) as stop:
            list(trainer.run(should_stop=lambda trainer=trainer, after=after: trainer.step >= after))
        runner.save_checkpoint(Store(tmp_path / "parts"), identity_of(run), stop.value.checkpoints[0])
    got = {record.run_id: record for record in execute(tmp_path / "parts", *pair)}
    for record in want:
        found = got[record.run_id]
        assert found.fleet_size == 1
        assert found.metric("valid", "loss") == pytest.approx(record.metric("valid", "loss"), rel=1e-5)


def test_a_corrupt_checkpoint_is_ignored_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    (want,) = execute(tmp_path, spec())
    (store.path(want.run_id) / "record.json").unlink()
    (store.path(want.run_id) / "checkpoint.pt").write_bytes(b"not a checkpoint")
    (again,) = execute(tmp_path, spec())
    assert capsys.readouterr().out.count("Ignored") == 1
    assert again.metrics == want.metrics
    assert not (store.path(want.run_id) / "checkpoint.pt").exists()


def test_early_stop() -> None:
    ((_, curve),) = finish(FleetTrainer([spec(stop_at=0.01, epochs=50)], CPU))
    assert len(curve) < 50
    assert curve[-1]["valid_accuracy"] > 0.01


def test_divergence_is_a_record_with_its_reason(tmp_path: Path) -> None:
    diverged, fine = execute(tmp_path, spec(lr=1e30, weight_decay=0.0), spec(weight_decay=0.0))
    assert diverged.status == "diverged"
    assert "lr 1e+30" in diverged.reason
    assert diverged.metric("valid", "accuracy") is None
    assert Store(tmp_path).read(diverged.run_id) == diverged
    assert fine.status == "done"


def test_failure_is_a_record_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the mixer is\nbroken")

    monkeypatch.setattr(LanguageModel, "hidden", broken)
    for record in execute(tmp_path, spec(), spec(seed=1)):
        assert (record.status, record.reason) == ("failed", "RuntimeError: the mixer is broken")


@pytest.mark.parametrize(
    ("fits", "status", "sizes", "parts"), [(0.5, "done", {1, 2}, 1), (0.25, "done", {1}, 4), (0, "oom", {1}, 8)]
)
def test_out_of_memory_halves_the_fleet_then_the_batch_then_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: float, status: str, sizes: set[int], parts: int
) -> None:
    """A real out-of-memory needs a GPU that is too small, so the error is raised by hand; `fits` counts batches of a run."""
    original = Fleet.step_on

    def limited(self: Fleet, *arguments: object) -> None:
        limit = 2 if fits == 0.5 else fits
        if len(self.model) / self.micro_batches > limit:
            raise torch.OutOfMemoryError("out of memory")
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Fleet, "step_on", limited)
    records = execute(tmp_path, *(spec(seed=seed) for seed in range(3)))
    assert {record.status for record in records} == {status}
    assert {record.fleet_size for record in records} == sizes
    assert max(record.micro_batches for record in records) == parts


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    with LocalWorkers(["cpu"], tmp_path) as workers:
        workers.submit((spec(epochs=100000), spec(epochs=100000, seed=1)), {})
        kinds = []
        while "progress" not in kinds:
            kinds += [event.kind for event in workers.events(1.0)]
        workers.workers[0].process.kill()
        while "died" not in kinds:
            kinds += [event.kind for event in workers.events(1.0)]
        assert workers.idle() == 1
    record = runner.record_death(spec(), CPU, Store(tmp_path), "signal 9")
    assert record is not None
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
    train = TrainSpec(batch_size=16, shuffle=shuffle)  # type: ignore[arg-type]
    cells, examples = epoch_plan([64, 40], train, [0, 1], 0)
    assert sorted(cells) == [0] * 4 + [1] * 3
    for column in (0, 1):
        for index, size in enumerate((64, 40)):
            chosen = examples[np.array(cells) == index, column]
            assert sorted(chosen[chosen >= 0].tolist()) == list(range(size))
    again, later = epoch_plan([64, 40], train, [1], 0), epoch_plan([64, 40], train, [1], 1)
    assert again[0] == cells and np.array_equal(again[1][:, 0], examples[:, 1])
    assert (np.array_equal(examples[:, 0], examples[:, 1])) == (shuffle == "none")
    assert (again[0] == later[0] and np.array_equal(again[1], later[1])) == (shuffle == "none")


@pytest.mark.parametrize("name", ["mqar", "mad_noisy_recall", "in_context_regression"])
@pytest.mark.parametrize("shuffle", ["none", "batches", "examples"])
def test_a_streamed_split_gives_the_examples_of_the_whole(monkeypatch: pytest.MonkeyPatch, name: str, shuffle: str) -> None:
    """Each batch equals that of a resident split, blocks follow one another, and an epoch shows every example once."""
    cells = {"mqar": CELLS["train_cells"], "mad_noisy_recall": "16:64+24:40", "in_context_regression": "8:64+9:40"}[name]
    test = {"mqar": "16x2:8", "mad_noisy_recall": "16:8", "in_context_regression": "8:8"}[name]
    task = TaskSpec(name=name, options={"train_cells": cells, "valid_cells": test, "test_cells": test})
    runs = [spec(shuffle=shuffle, seed=seed).model_copy(update={"task": task}) for seed in (0, 1)]
    whole = FleetTrainer(runs, CPU)
    monkeypatch.setattr(_splits, "BLOCK_ROWS", 24)
    monkeypatch.setattr(streamed, "BLOCK_ROWS", 24)
    resident = FleetTrainer(runs, CPU).train_cells
    monkeypatch.setattr(streamed, "STREAMED_BYTES", 0)
    trainer = FleetTrainer(runs, CPU)
    assert not whole.streams and [len(cell) for cell in trainer.train_cells] == [24, 24]
    cells, firsts, plan_PSB, _ = trainer._plan_epoch()
    turns: list[list[int]] = [[], []]
    for cell, first, examples_SB in zip(cells, firsts, plan_PSB, strict=True):
        trainer.streams[cell].hold(first)
        picked, expected = (found[cell].pick(trainer.fleet.sets_E, examples_SB) for found in (trainer.train_cells, resident))
        real, rows = examples_SB >= 0, expected.rows_EBM.shape[2]
        assert torch.equal(picked.inputs[real], expected.inputs[real])
        assert torch.equal(picked.labels_EBM[:, :, :rows], expected.labels_EBM) and (picked.labels_EBM[:, :, rows:] == -100).all()
        assert torch.equal(picked.rows_EBM[:, :, :rows][real], expected.rows_EBM[real])
        if expected.values_EBMK is not None and picked.values_EBMK is not None:
            assert torch.equal(picked.values_EBMK[real], expected.values_EBMK[real])
        turns[cell] += [first // 24] * (first // 24 not in turns[cell][-1:])
    assert [sorted(turn) for turn in turns] == [[0, 1, 2], [0, 1]], "a block is drawn once"
    for column in (0, 1):
        for cell, size in enumerate((64, 40)):
            shown = plan_PSB[np.array(cells) == cell, column].flatten().tolist()
            assert sorted(example for example in shown if example >= 0) == list(range(size))
    assert all(math.isfinite(point["train_loss"]) for _, curve in finish(trainer) for point in curve)


def test_zoology_frame_has_its_quirks() -> None:
    task = build_task(TaskSpec(name="mqar", options=CELLS))
    model = build_model(spec("attention*2", model={"n_layers": 4}), task, CPU)
    x_BTD = torch.randn(2, 5, 16)
    r_BTD = x_BTD
    for block in model.blocks:
        mixed = r_BTD + block.mixer(block.norm1(r_BTD))[0]
        r_BTD = mixed + block.norm2(mixed)
    torch.testing.assert_close(model.hidden(x_BTD), r_BTD)
    out = torch.cat([block.mixer.out_proj.weight.flatten() for block in model.blocks])
    assert float(out.detach().std()) == pytest.approx(0.02 / math.sqrt(8), rel=0.1)
    mamba, r_BTD = build_model(spec("mamba2*2"), task, CPU), x_BTD
    for block in mamba.blocks:
        r_BTD = r_BTD + block.mixer(block.norm1(r_BTD))[0]
    torch.testing.assert_close(mamba.hidden(x_BTD), r_BTD)


def test_layers_are_cycled() -> None:
    task = build_task(TaskSpec(name="mqar", options=CELLS))
    model = build_model(spec("gla*3+attention", model={"n_layers": 8}), task, CPU)
    assert [mixer.name for mixer in model.mixers()] == ["gla", "gla", "gla", "attention"] * 2
