"""Sources, their weights and held-out parts, and the recall that is rendered from text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.convert.data import Corpus, TrainingData, load_data
from bench.convert.rendered import _repeated, _scattered, render_recall
from bench.convert.resolve import parse_source
from bench.convert.spec import Source
from bench.errors import UserError
from tests.convert.conftest import SENTENCES
from tests.convert.texts import data_of


def test_batches_depend_on_seed_stage_and_step_alone(text: Path, tokenizer):
    data, again = data_of(text, tokenizer, recall=0.5), data_of(text, tokenizer, recall=0.5)
    assert torch.equal(data.batch(1, 7, 6, 48), again.batch(1, 7, 6, 48))
    assert not torch.equal(data.batch(1, 7, 6, 48), data.batch(1, 8, 6, 48))
    assert not torch.equal(data.batch(1, 7, 6, 48), data.batch(2, 7, 6, 48))
    assert data.digest() == again.digest() != data_of(text, tokenizer).digest()


def rows_file(folder: Path, name: str, **row: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row | {"id": str(i)}) + "\n" for i in range(50)))


def test_a_data_set_is_a_source_and_its_field_is_found(tokenizer, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows_file(tmp_path / "set", "train.jsonl", content="A mixer reads one token at a time.")
    source = Source(kind="dataset", where=str(tmp_path / "set"))
    data = load_data([source], tokenizer, 280, 0, min_length=48, cap=10**6)
    assert tokenizer.decode(data.corpora[0].tokens[:200]).count("A mixer reads one token at a time.<|end|>") >= 3
    rows_file(tmp_path / "other", "train.jsonl", words="none")
    with pytest.raises(UserError, match="has the fields words, id; text is expected in text or content or document"):
        load_data([source.model_copy(update={"where": str(tmp_path / "other")})], tokenizer, 280, 0, min_length=48, cap=10**6)
    with pytest.raises(UserError, match=r"The data set 'no/such' cannot be loaded .*corpus:DIR from `bench sample`"):
        load_data([source.model_copy(update={"where": "no/such"})], tokenizer, 280, 0, min_length=48, cap=10**6)


def test_sources_are_drawn_by_their_weights():
    corpora = [
        Corpus(Source(kind="text", where=name, weight=weight), np.full(4000, token, np.int32))
        for name, weight, token in (("a", 3.0, 1), ("b", 1.0, 2))
    ]
    rows = torch.cat([TrainingData(corpora, None, 0).batch(0, step, 64, 8)[:, 0] for step in range(40)])
    assert (rows == 1).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_held_out_text_is_not_trained_on():
    data = TrainingData([Corpus(Source(kind="text", where="x"), torch.arange(10_000).int().numpy())], None, 0)
    seen = torch.cat([data.batch(0, step, 50, 40).flatten() for step in range(20)])
    assert seen.max() < data.held_out(8, 40).min()


def numbers_in(text: str) -> list[str]:
    return [word.strip(".:") for word in text.split() if word.strip(".:").isdigit() and len(word.strip(".:")) >= 3]


def test_rendered_lists_ask_for_what_they_told(tokenizer):
    row = tokenizer.decode(render_recall(tokenizer, np.random.default_rng(1), 700, kind="lists"))
    numbers = numbers_in(row.split("\n\n")[0])
    assert len(numbers) >= 4
    told, asked = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    assert sorted(told) == sorted(asked)


def test_rendered_facts_stand_in_running_text_and_are_asked_for(tokenizer):
    word = tokenizer("window", add_special_tokens=False)["input_ids"][0]
    row = _scattered(tokenizer, np.random.default_rng(1), 700, lambda n: np.full(n, word))
    assert row.shape == (700,)
    numbers = numbers_in(tokenizer.decode(row))
    assert len(numbers) >= 2
    assert sorted(numbers[: len(numbers) // 2]) == sorted(numbers[len(numbers) // 2 :])


def test_repeated_passages_come_from_the_first_half():
    row = _repeated(np.random.default_rng(2), 400, np.arange)
    again = row[row < np.arange(400)]
    assert len(again) >= 400 // 16
    assert again.max() < 200
    assert (np.diff(again) == 1).all()


@pytest.mark.parametrize(("kind", "told"), [("lists", False), ("facts", True), ("passages", True)])
def test_a_kind_of_recall_is_a_source(kind: str, told: bool, text: Path, tokenizer):
    """Only lists hold nothing of the running text, of which every line here has a number and a full stop."""
    texts = load_data([Source(kind="text", where=str(text))], tokenizer, 280, 0, min_length=48, cap=10**6).corpora
    drawn = TrainingData([*texts, Corpus(parse_source(f"recall:{kind}=1e6"), np.zeros(0, np.int32))], tokenizer, 0)
    rows = [tokenizer.decode(row) for row in drawn.batch(0, 0, 5, 300)]
    assert [any(sentence[:20] in row for sentence in SENTENCES) for row in rows] == [told] * 5


def test_recall_without_and_with_text_has_the_length(text: Path, tokenizer):
    data = data_of(text, tokenizer, recall=1000.0)
    assert data.batch(0, 0, 9, 300).shape == (9, 300)
    alone = TrainingData([Corpus(Source(kind="recall"), np.zeros(0, np.int32))], tokenizer, 0)
    assert alone.batch(0, 0, 2, 300).shape == (2, 300)
