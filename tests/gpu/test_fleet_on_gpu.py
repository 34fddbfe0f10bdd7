"""What only a GPU shows of a fleet: scores that are replayed, and checkpoints that come back to the device."""

from __future__ import annotations

import pytest
import torch

from bench import scoring
from bench.checkpoints import packed, unpacked
from bench.scoring import Scorer
from bench.train import FleetTrainer, Interrupted
from tests.unit.small_runs import finish, spec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda")


@pytest.mark.parametrize("mixer", ["attention", "mamba2:head_dim=16"])
def test_replayed_scores_are_those_of_the_weights_of_now(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds and cells in seven parts, the last of which is padded: run, recorded in a graph, replayed, replayed."""
    monkeypatch.setitem(scoring.EVAL_TOKENS, "cuda", 160)  # five examples of 16 tokens for two members
    trainer = FleetTrainer([spec(mixer, lr=0.1), spec(mixer, seed=1)], GPU)
    model, sets = trainer.fleet.model, trainer.fleet.sets_E.tolist()
    seen = []
    for _ in range(4):
        got = trainer._scorer.scores()
        want = Scorer(model, trainer.valid, sets).scores()
        for mine, other in zip(got, want, strict=True):
            assert mine.accuracy == other.accuracy and mine.examples == other.examples and mine.groups == other.groups
            assert mine.loss == pytest.approx(other.loss, rel=1e-6) and mine.stderr == pytest.approx(other.stderr, rel=1e-6)
        seen.append(got[0].mean(got[0].loss))
        for cell in range(len(trainer.train_cells)):
            trainer.fleet.examples_SB.copy_(torch.arange(16, device=GPU))
            trainer.fleet.rates_E.fill_(0.01)
            trainer.advance(cell)
    assert len(set(seen)) == 4


def test_a_fleet_goes_on_from_its_checkpoint() -> None:
    pair = [spec("gla:n_heads=2"), spec("gla:n_heads=2", seed=1)]
    whole = finish(FleetTrainer(pair, GPU))
    part = FleetTrainer(pair, GPU)
    with pytest.raises(Interrupted) as stop:
        list(part.run(should_stop=lambda: part.step >= 7))
    rest = FleetTrainer(pair, GPU, checkpoints=[unpacked(packed(content)) for content in stop.value.checkpoints])
    assert rest.step == 7
    for (want, want_curve), (got, curve) in zip(whole, finish(rest), strict=True):
        for point, before in zip(curve, want_curve, strict=True):
            assert point == pytest.approx(before, rel=1e-3, abs=1e-4)
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-2, atol=1e-3, msg=key)
