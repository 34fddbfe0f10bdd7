"""The trainer: what it leaves out or does together changes nothing, and checkpoints are exact."""

from __future__ import annotations

import io

import pytest
import torch
from torch.nn import functional as F

from bench.build import build_model, build_task
from bench.data import device_split
from bench.stacked import compile_for_cells
from bench.train import FleetTrainer, Interrupted
from tests.unit.plain_trainer import train_plainly
from tests.unit.small_runs import CPU, finish, spec


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


def test_early_stop() -> None:
    ((_, curve),) = finish(FleetTrainer([spec(stop_at=0.01, epochs=50)], CPU))
    assert len(curve) < 50
    assert curve[-1]["valid_accuracy"] > 0.01


def test_a_compiled_fleet_gets_smaller_when_that_pays() -> None:
    trainer = FleetTrainer([spec(epochs=32), spec(epochs=32, seed=1)], CPU)
    trainer.epoch, trainer._epoch_seconds = 12, 2.0  # 20 left
    for compiling, pays in ((40.0, False), (18.0, True)):
        trainer._compile_seconds = compiling
        assert trainer._pays(0.5) == pays
    assert trainer._pays(0.0) and not trainer._pays(0.9)


def test_a_fleet_is_compiled_whole_or_not_at_all() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_for_cells(broken)(torch.ones(2))


def test_a_rehearsal_leaves_no_trace() -> None:
    pair = [spec(), spec(seed=1)]
    rehearsed, fresh = FleetTrainer(pair, CPU), FleetTrainer(pair, CPU)
    for trainer in (rehearsed, fresh):
        trainer.fleet.sums_E3.fill_(3.0)
    for cell in (0, 1):
        rehearsed.fleet.rehearse(cell)
    rehearsed._scorer.rehearse()
    for got, want in zip(rehearsed.fleet.states(), fresh.fleet.states(), strict=True):
        for name, value in vars(want).items():
            assert torch.equal(getattr(got, name), value), name
    for trainer in (rehearsed, fresh):
        trainer.fleet.sums_E3.zero_()
    for (got, curve), (want, want_curve) in zip(finish(rehearsed), finish(fresh), strict=True):
        assert curve == want_curve
        assert all(torch.equal(got[key], value) for key, value in want.items())


def test_linear_maps_with_a_bias_answer_in_bf16_in_a_fleet_too() -> None:
    seen: list[tuple[bool, torch.dtype]] = []
    for size in (1, 2):
        trainer = FleetTrainer([spec("hyena*2", precision="bf16", seed=seed) for seed in range(size)], CPU)
        mixer = trainer.fleet.model.module.blocks[0].mixer
        for layer in (mixer.in_proj, mixer.out_proj, mixer.filter.readout):
            layer.register_forward_hook(lambda layer, inputs, output: seen.append((layer.bias is not None, output.dtype)))
        trainer.fleet.step_on(trainer.train_cells[0])
        assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}  # the filter stays in fp32
