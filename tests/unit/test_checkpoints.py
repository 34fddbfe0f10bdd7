"""Checkpoints in a store: taken up again, refused if damaged, however the run is spelled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import runner
from bench.checkpoints import packed
from bench.claims import Claims
from bench.outcome import identity_of
from bench.spec import RunSpec
from bench.store import Store
from bench.train import FleetTrainer, Interrupted
from tests.unit.small_runs import CPU, execute, spec


def _interrupted(tmp_path: Path, run: RunSpec, after: int) -> tuple[Store, str]:
    """The store of a run that left a checkpoint."""
    trainer, store = FleetTrainer([run], CPU), Store(tmp_path)
    with pytest.raises(Interrupted) as stop:
        list(trainer.run(should_stop=lambda: trainer.step >= after))
    store.put(identity_of(run), "checkpoint.pt", packed(stop.value.checkpoints[0]))
    return store, identity_of(run)


def test_members_stopped_at_different_steps_go_on(tmp_path: Path) -> None:
    pair = [spec(), spec(seed=1)]
    want = execute(tmp_path / "whole", *pair)
    for run, after in zip(pair, (3, 9), strict=True):
        trainer = FleetTrainer([run], CPU)
        with pytest.raises(Interrupted) as stop:
            list(trainer.run(should_stop=lambda trainer=trainer, after=after: trainer.step >= after))
        Store(tmp_path / "parts").put(identity_of(run), "checkpoint.pt", packed(stop.value.checkpoints[0]))
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


def test_a_checkpoint_with_one_changed_number_is_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, identity = _interrupted(tmp_path, spec(), 9)
    path = store.path(identity) / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    execute(tmp_path, spec())
    assert "damaged" in capsys.readouterr().out


def test_checkpoints_wait_in_the_memory_of_the_host(tmp_path: Path) -> None:
    store, _ = _interrupted(tmp_path, spec(), 9)
    with Claims(store) as claims:
        job = runner._Job(torch.device("meta"), store, claims, lambda kind, content: None, lambda: False)
        checkpoint = job._checkpoint(spec())
    assert checkpoint is not None and checkpoint["weights"].device == CPU


def test_a_checkpoint_goes_on_however_its_run_is_spelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = spec()
    _interrupted(tmp_path, run, 9)
    other = run.model_copy(update={"model": run.model.model_copy(update={"alias": "another spelling"})})
    execute(tmp_path, other)
    assert "Ignored" not in capsys.readouterr().out


def test_a_checkpoint_of_the_middle_of_an_epoch_has_the_time_until_then() -> None:
    trainer, seconds = FleetTrainer([spec()], CPU), []
    (member,) = trainer.members
    list(trainer.run(on_checkpoint=lambda found: seconds.append(found[0]["seconds"]), checkpoint_seconds=0.0))
    assert 0 < seconds[0] < seconds[1] < seconds[-1] <= member.seconds
