"""Softmax layers in training: no search for packed sequences, the same numbers, and everything as it was afterwards."""

import pytest
import torch
from transformers import masking_utils

from bench.convert.softmax import CAUSAL, sees_everything, training_softmax
from bench.convert.spec import LayerPlan, Stage
from bench.convert.student import build_student
from tests.convert.conftest import tiny, tokens

LOGITS = Stage(capture="logits", loss="kl_ce", kl=1.0, seq_len=60)


def test_whole_rows_are_not_searched_for_packed_ones(teacher, monkeypatch: pytest.MonkeyPatch):
    student = build_student(teacher, [LayerPlan(mixer="gated_delta_net", window=7, combine="gate"), None]).eval()
    runs = [lambda: student.hidden(tokens()), lambda: teacher.model(input_ids=tokens(), use_cache=False).last_hidden_state]
    wanted = [run() for run in runs]

    def search(*_: object) -> None:
        raise AssertionError("the processor would wait for the device here")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", search)
    with training_softmax(LOGITS, teacher, student):
        for run, hidden in zip(runs, wanted, strict=True):
            torch.testing.assert_close(run(), hidden)
    assert teacher.config._attn_implementation == student.lm.config._attn_implementation == "sdpa"
    with pytest.raises(AssertionError, match="would wait"):
        runs[1]()


@pytest.mark.parametrize(
    ("changes", "whole"),
    [
        ({"sliding_window": 8}, False),
        ({"sliding_window": 60}, True),
        ({"sliding_window": None}, True),
    ],
)
def test_a_window_of_the_teachers_own_keeps_its_mask(changes: dict, whole: bool):
    teacher = tiny("Mistral", **changes)
    wanted = teacher.model(input_ids=tokens(), use_cache=False).last_hidden_state
    assert sees_everything(teacher.config, 60) == whole
    with training_softmax(LOGITS, teacher):
        assert (teacher.config._attn_implementation == CAUSAL) == whole
        torch.testing.assert_close(teacher.model(input_ids=tokens(), use_cache=False).last_hidden_state, wanted)


def test_matrices_are_captured_from_eager_attention(teacher):
    with training_softmax(Stage(capture="attn_weights", loss="frobenius"), teacher):
        assert teacher.config._attn_implementation == "eager"
    assert teacher.config._attn_implementation == "sdpa"
