"""Keys kept by score: the same function in pieces, against a loop that keeps what the definition says, and what scores learn."""

from pathlib import Path

import pytest
import torch

from bench.convert.align import alignment_backward
from bench.convert.gate import check_model
from bench.convert.kept import FLOOR, KeptKeys
from bench.convert.parameters import choose_parameters
from bench.convert.spec import LayerPlan, Stage
from bench.convert.student import build_student
from bench.errors import UserError

PLAN = LayerPlan(mixer=None, combine="sum", window=7, sinks=2, far_heads="0.1,1", far_window=20, far_keys="best")
SCORES = Stage(capture="far_attention", train=("mixer",))


def tokens(length: int = 90) -> torch.Tensor:
    return torch.randint(1, 280, (3, length), generator=torch.Generator().manual_seed(1))


def kept_keys(**changes) -> KeptKeys:
    torch.manual_seed(3)
    return KeptKeys(2, 8, 12, **({"window": 5, "kept": 4, "sinks": 2} | changes))


def inputs(length: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(2)
    return tuple(torch.randn(2, *shape, generator=draw) for shape in ((4, length, 8), (2, length, 8), (2, length, 8), (length, 12)))


def by_definition(branch: KeptKeys, q, k, v, x) -> torch.Tensor:
    """Token by token with lists: the newest `window`, the sinks, and the best of those that left."""
    score = (branch.scores(x).detach() * 256).round()
    o = torch.zeros_like(q)
    for row in range(len(q)):
        for head in range(q.shape[1]):
            group, pool = head // 2, []
            for t in range(q.shape[2]):
                leaving = t - branch.window
                if leaving >= branch.sinks:
                    pool = sorted([*pool, leaving], key=lambda j: (float(score[row, group, j]), j))[-branch.kept :]
                visible = sorted({*range(min(branch.sinks, t + 1)), *pool, *range(max(0, leaving + 1), t + 1)})
                weights = (k[row, group, visible] @ q[row, head, t] * 8**-0.5).softmax(0)
                o[row, head, t] = weights @ v[row, group, visible]
    return o


@pytest.mark.parametrize("changes", [{}, {"sinks": 0}, {"window": 1}, {"kept": 1}, {"kept": 100}])
@pytest.mark.parametrize("length", [1, 3, 40])
def test_a_pass_is_the_definition(length: int, changes: dict):
    branch, (q, k, v, x) = kept_keys(**changes), inputs(length)
    torch.testing.assert_close(branch(q, k, v, None, x)[0], by_definition(branch, q, k, v, x))


@pytest.mark.parametrize("pieces", [[1] * 40, [17, 1, 22], [3, 37]])
@pytest.mark.parametrize("changes", [{}, {"sinks": 0}, {"window": 1}])
def test_pieces_are_the_whole(pieces: list[int], changes: dict):
    branch, (q, k, v, x) = kept_keys(**changes), inputs(40)
    state = branch.init_state(2, device="cpu", dtype=torch.float32)
    sizes = {name: a.shape for name, a in state.items()}
    found = []
    for part in zip(*(a.split(pieces, 2) for a in (q, k, v)), x.split(pieces, 1), strict=True):
        o, state = branch(*part[:3], state, part[3])
        found.append(o)
    torch.testing.assert_close(torch.cat(found, 2), by_definition(branch, q, k, v, x))
    assert {name: a.shape for name, a in state.items()} == sizes


@torch.no_grad()
@pytest.mark.parametrize("kept", [4, 100])
def test_long_texts_go_in_pieces(kept: int, monkeypatch: pytest.MonkeyPatch):
    """With a state and without one; the state after is that of one pass."""
    branch, (q, k, v, x) = kept_keys(kept=kept), inputs(40)
    first = branch.init_state(2, device="cpu", dtype=torch.float32)
    whole, state = branch(q, k, v, first, x)
    monkeypatch.setattr("bench.convert.kept.PIECE", 16)
    for given in (None, first):
        o, found = branch(q, k, v, given, x)
        torch.testing.assert_close(o, whole)
        torch.testing.assert_close(found, None if given is None else state)


def test_of_equal_scores_the_newer_key_stays():
    branch, (q, k, v, x) = kept_keys(), inputs(40)
    x = x[:, :1].expand_as(x)
    torch.testing.assert_close(branch(q, k, v, None, x)[0], by_definition(branch, q, k, v, x))


@pytest.mark.parametrize("changes", [{}, {"mixer": "gated_delta_net", "combine": "gate", "groups": "share"}, {"sinks": 0}])
def test_a_student_that_keeps_keys_is_one_function(changes: dict, teacher, tmp_path: Path):
    student = build_student(teacher, [PLAN.model_copy(update=changes)] * 2).eval()
    student.save_pretrained(tmp_path)
    result = check_model(student, tokens(), folder=tmp_path)
    assert result.passed, result.sentence()


def test_keys_that_all_fit_are_the_teacher(teacher):
    plan = PLAN.model_copy(update={"far_heads": "0,1", "far_window": 200})
    student = build_student(teacher, [plan] * 2).eval()
    torch.testing.assert_close(student(tokens()).logits, teacher(tokens()).logits, atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_attention_drawn_from_afar():
    branch, (q, k, _, x) = kept_keys(), inputs(12)
    score, errors = branch.scores(x), []
    for row in range(2):
        for group in range(2):
            for j in range(branch.sinks, 12 - branch.window):
                drawn = FLOOR
                for head in (2 * group, 2 * group + 1):
                    for t in range(j + branch.window, 12):
                        logits = k[row, group, : t + 1] @ q[row, head, t] * 8**-0.5
                        drawn = max(drawn, float(logits.log_softmax(0)[j]))
                errors.append((score[row, group, j] - drawn) ** 2)
    torch.testing.assert_close(branch.loss(q, k, x), torch.stack(errors).mean())


def test_scores_learn_from_the_teacher(teacher):
    """A stage of scores trains them and nothing else, and its loss falls."""
    student = build_student(teacher, [PLAN] * 2)
    ((_, trained),) = choose_parameters(student, teacher, SCORES)
    assert {name.split(".")[-2] for name in trained} == {"hidden", "score"}
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(float(alignment_backward(student, teacher, tokens(40), SCORES, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]


def test_a_stage_of_scores_needs_scores(teacher):
    student = build_student(teacher, [PLAN.model_copy(update={"far_keys": "newest", "mixer": "gla", "combine": "gate"})] * 2)
    choose_parameters(student, teacher, SCORES)
    with pytest.raises(UserError, match=r"set plan\.far_heads and plan\.far_keys=best"):
        alignment_backward(student, teacher, tokens(40), SCORES, 1.0)
