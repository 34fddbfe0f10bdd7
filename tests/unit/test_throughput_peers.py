"""Peers get the problem they say they solve, and the table of speeds says what it was given; on a CPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.speed_records import Peer, SpeedRecord, Timing
from bench.throughput import peers, tuning
from bench.throughput.bounds import Shape
from bench.throughput.draws import Draw
from bench.throughput.kernels import OPERATIONS, Recurrence
from bench.throughput.measure import Session
from bench.throughput.names import KERNELS
from bench.throughput.plan import Row
from bench.throughput.problem import check
from kernels.attention import attention_reference
from kernels.reference import linear_recurrence_reference
from tests.benchmarks import speed_table
from tests.benchmarks.speed_table import Goal, Speeds
from tests.report.fake_store import speed

CPU = Draw(torch.device("cpu"), torch.float32, torch.Generator())


@pytest.mark.parametrize("length", [70, 1500])
def test_chosen_blocks_as_numbers_are_the_same_choice(length):
    problem = OPERATIONS["chosen_blocks"].problem(KERNELS["chosen_blocks"].shape(2, length, 4, 8), "forward", CPU)

    def by_number(own):
        numbers = own["blocks"].transpose(1, 2)[..., None, :]
        token = torch.arange(length)
        visible = (numbers == token[:, None] // 64).any(-1) & (token <= token[:, None])
        k, v = (own[name].expand(-1, 4, -1, -1) for name in ("k", "v"))
        return {"o": attention_reference(own["q"], k, v, visible)}

    assert problem.inputs["blocks"].shape == (2, length, 1, 16)
    assert check(problem, gradients=False, against="", function=by_number).passed


def test_mamba_2_is_our_recurrence_with_values_times_time_steps():
    problem = Recurrence("scalar").problem(Shape(2, 20, 2, 1, 8, 4), "train", CPU)
    equals = peers.PEERS["ssd"][0].equals
    assert equals is not None

    def stepped(own):
        step = -own["log_decay"][..., None]
        return problem.call(own | {"v": own["v"] * step})

    assert not check(problem, gradients=True, against="", function=stepped).passed
    definition = problem.definition
    same = replace(problem, definition=lambda own: equals(definition, own))
    assert check(same, gradients=True, against="", function=stepped).passed


def test_flash_qla_is_given_our_problem(monkeypatch):
    def theirs(q, k, v, g, beta, scale):  # by its signature; the package itself needs a Hopper GPU
        return linear_recurrence_reference(scale * q, k, v, log_decay=g, beta_BTH=beta)

    monkeypatch.setitem(sys.modules, "flash_qla", SimpleNamespace(chunk_gated_delta_rule=theirs))
    problem = OPERATIONS["gated_delta"].problem(Shape(2, 20, 2, 2, 8, 8), "train", CPU)
    peer = next(peer for peer in peers.PEERS["gated_delta"] if peer.package == "flash-qla")
    assert check(problem, gradients=True, against="", function=peer.function).passed


def test_a_peer_is_checked_once_and_with_the_sizes_of_its_row(monkeypatch):
    seen = []

    def peer(own):
        seen.append(tuple(own["q"].shape))
        return {"o": OPERATIONS["linear"].problem(Shape(1, 1, 1, 1, 8, 8), "forward", CPU).call(own)["o"]}

    monkeypatch.setitem(peers.PEERS, "linear", (peers.PublicPeer("theirs", "torch", peer, ("forward",)),))
    session = Session(torch.device("cpu"), with_peers=True)
    for length in (16, 24):
        record = session.measure(Row("kernel", "linear", "forward", 1, length, 3, 8, "fp32"))
        assert [(one.name, one.reason, one.eager is not None) for one in record.peers] == [("theirs", "", True)]
    assert seen.count((1, 37, 3, 8)) == 1


def test_autotuners_choose_for_each_width(monkeypatch):
    from triton.runtime import autotuner

    monkeypatch.setattr(autotuner.Autotuner, "__init__", autotuner.Autotuner.__init__)
    tuning.tune_by_width.__wrapped__()

    def kernel(x, H, K, B):
        pass

    configs = [autotuner.Config({"B": size}) for size in (16, 32)]
    tuner = autotuner.Autotuner(kernel, ["x", "H", "K", "B"], configs, ["H"], None, None)
    assert tuner.keys == ["H", "K", "V", "hdim", "dstate"]


def timed(name: str, mode: str, microseconds: float, *, bound: float, peer: float | None = None, length: int = 2048) -> SpeedRecord:
    """A row at sixteen heads of 128, with graph times."""

    def graph(median: float) -> Timing:
        return Timing(median_us=median, low_us=median, high_us=median, n=9)

    record = speed(name, mode, kind="kernel", length=length)
    shape = {"batch": 8, "length": length, "heads": 16, "groups": 16, "key": 128, "value": 128}
    theirs = [] if peer is None else [Peer(name="theirs", version="1", graph=graph(peer))]
    bounds = record.bound.model_copy(update={"microseconds": bound})
    return record.model_copy(update={"shape": shape, "graph": graph(microseconds), "peers": theirs, "bound": bounds})


def test_the_table_says_which_goals_are_met(monkeypatch):
    monkeypatch.setattr(speed_table, "GOALS", (Goal("linear", 128, 0.088, 0.33), Goal("delta", 128, 0.113, 0.64)))
    speeds = Speeds(
        [
            timed("linear", "forward", 87.0, bound=60.0, peer=261.0),
            timed("linear", "train", 331.0, bound=170.0, peer=165.5),
            timed("linear", "forward", 174.0, bound=60.0, length=8192),
        ]
    )
    first, second = list(speed_table.main_table(speeds))[1:]
    assert "| linear | 128 | 0.087 / 0.331 | 0.088 / 0.330 | 0.060 / 0.170 |" in first
    assert "0.261 / 0.166 theirs | 3.00 / 0.50 | yes / no |" in first
    assert second.endswith("| - / - | - | - / - | ? / ? |")
    assert "| - / - (- / -) | 2.00 / - (- / -) | - / - (- / -) | no, 2.00 |" in "\n".join(speed_table.length_table(speeds))
    mean, slower = speed_table.geometric_mean(speeds)
    assert "over 2 rows with a peer: 1.22 (goal 2.0); slower than the peer: 1." in mean
    assert slower == "linear D=128 T=2048 forward and backward (0.50)"
    assert speed_table.goals_met(speeds) == "Met: 1 of 4, not met: 1, not measured: 2."


def test_a_goal_can_be_a_multiple_of_the_peer_or_of_the_bound():
    record = timed("chosen_blocks", "forward", 100.0, bound=40.0, peer=190.0)
    assert speed_table.is_met(Goal("chosen_blocks", 128, peers=2.0), record) is False
    assert speed_table.is_met(Goal("chosen_blocks", 128, floor=3.0), record) is True
    assert speed_table.is_met(Goal("chosen_blocks", 128), record) is None
