"""Recall items: they fit, the answer stands where it should, and they are the same for every model of a tokenizer."""

import pytest

from bench.judge import packaged
from bench.judge.items import FAMILIES, ROOM, Maker


@pytest.fixture(scope="module")
def maker(tokenizer) -> Maker:
    return Maker(tokenizer, ["A mixer reads one token at a time.", "The window sees the last keys and nothing else."] * 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_items_fit_and_hold_their_answer(family: str, maker: Maker):
    rows = maker.items(family, [512, 900], 8)
    assert [row["max_length"] for row in rows] == [512] * 8 + [900] * 8
    for row in rows:
        length = maker.count(row["text"])
        assert length <= row["max_length"] - ROOM
        assert length > 0.5 * row["max_length"]
        assert row["answer"] in row["text"]
        assert not row["text"].endswith(" ")
    distances = [row["distance"] for row in rows[:8]]
    assert distances == sorted(distances, reverse=True) and distances[0] > 2 * distances[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_items_do_not_depend_on_what_else_is_made(family: str, maker: Maker):
    alone = maker.items(family, [900], 2)
    assert maker.items(family, [512, 900], 2)[2:] == alone
    assert maker.items(family, [900], 3)[:2] == alone
    assert len({row["text"] for row in maker.items(family, [900], 3)}) == 3


def test_the_answer_of_a_list_is_that_of_the_key_that_is_asked(maker: Maker):
    for row in maker.items("phone_book", [700], 4):
        name = row["text"].rsplit("\n", 1)[1]
        assert f"{name} {row['answer']}\n" in row["text"]
        assert row["text"].count(name) == 2
        assert row["chance"] == pytest.approx(1 / (row["text"].count("-")))
    for row in maker.items("mqar_text", [700], 4):
        context, asked = row["text"].rsplit("\n\n", 1)
        key = asked.splitlines()[-1]
        assert f"{key} {row['answer']}\n" in context + "\n"
        assert key not in asked[: -len(key)]


def test_a_length_without_room_is_refused(maker: Maker):
    with pytest.raises(ValueError, match="leaves no room"):
        maker.items("passkey", [64], 1)


def test_packaged_text_is_prose_of_installed_libraries():
    sentences = packaged.prose(50)
    assert len(sentences) == 50 == len(set(sentences))
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in sentences)
    assert packaged.prose(50) == sentences
