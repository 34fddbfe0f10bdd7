"""Training text: sources tokenised once, batches drawn as a pure function of (seed, stage, step), so resuming is exact.

Shape legend: B batch, T time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.convert.rendered import render_recall
from bench.convert.spec import Source
from bench.convert.texts import documents
from bench.errors import UserError

HELD_OUT = 0.05
"""Share of every text that training never sees; the report's perplexity and agreement are measured there."""
MAX_CHARACTERS = 400_000_000
"""Text read of one source."""


@dataclass(frozen=True)
class Corpus:
    """The tokens of one source.

    Args:
        source: where they come from.
        tokens: integers; empty for rendered tasks, which are drawn afresh.
    """

    source: Source
    tokens: np.ndarray

    @property
    def train(self) -> np.ndarray:
        """All but the held-out end."""
        return self.tokens[: int(len(self.tokens) * (1 - HELD_OUT))]

    @property
    def held_out(self) -> np.ndarray:
        """The end, which is never trained on."""
        return self.tokens[int(len(self.tokens) * (1 - HELD_OUT)) :]


class TrainingData:
    """Several corpora drawn in the proportion of their weights.

    Args:
        corpora: at least one.
        tokenizer: of the teacher; renders recall tasks.
        seed: of the conversion.
    """

    def __init__(self, corpora: list[Corpus], tokenizer: Any, seed: int) -> None:
        self.corpora, self.tokenizer, self.seed = corpora, tokenizer, seed
        weights = np.array([corpus.source.weight for corpus in corpora])
        self.shares = weights / weights.sum()

    def batch(self, stage: int, step: int, rows: int, length: int) -> Tensor:
        """The tokens of one optimiser step: [B, T] int64, a function of the arguments and the seed alone."""
        draw = np.random.Generator(np.random.Philox(key=[self.seed, (stage << 40) + step]))
        which = draw.choice(len(self.corpora), size=rows, p=self.shares)
        return torch.from_numpy(np.stack([self._row(self.corpora[index], draw, length) for index in which]))

    def held_out(self, rows: int, length: int) -> Tensor:
        """Held-out tokens [B, T], evenly spread over the text sources.

        Raises:
            UserError: no source has enough held-out text.
        """
        texts = [corpus.held_out for corpus in self.corpora if len(corpus.held_out) > length]
        if not texts:
            raise UserError(f"No source has {length + 1} held-out tokens (the last {HELD_OUT:.0%}); give more text with --data.")
        found = []
        for row in range(rows):
            text = texts[row % len(texts)]
            room = len(text) - length
            found.append(text[(row // len(texts)) * length % room :][:length])
        return torch.from_numpy(np.stack(found).astype(np.int64))

    def digest(self) -> str:
        """Hash of all tokens, weights and the seed."""
        total = hashlib.sha256(json.dumps([self.seed, [c.source.model_dump(mode="json") for c in self.corpora]]).encode())
        for corpus in self.corpora:
            total.update(np.ascontiguousarray(corpus.tokens).tobytes())
        return total.hexdigest()[:16]

    def _row(self, corpus: Corpus, draw: np.random.Generator, length: int) -> np.ndarray:
        if corpus.source.kind == "recall":
            texts = [corpus for corpus in self.corpora if corpus.source.kind != "recall"]
            text = texts[draw.integers(len(texts))] if texts else None
            running = None if text is None else lambda n: _cut(text.train, draw, n)
            return render_recall(self.tokenizer, draw, length, running, corpus.source.where)
        return _cut(corpus.train, draw, length)


def _cut(tokens: np.ndarray, draw: np.random.Generator, length: int) -> np.ndarray:
    start = draw.integers(0, len(tokens) - length + 1)
    return tokens[start : start + length].astype(np.int64)


def load_data(sources: Iterable[Source], tokenizer: Any, vocab_size: int, seed: int, *, min_length: int, cap: int) -> TrainingData:
    """Reads and tokenises every source.

    Args:
        sources: where text comes from.
        tokenizer: the teacher's.
        vocab_size: ids must lie below.
        seed: of the conversion.
        min_length: longest training sequence, which every source must fill.
        cap: most tokens to read of one source.

    Raises:
        UserError: a source that does not exist, is too short, or was sampled with another tokenizer.
    """
    corpora = []
    for source in sources:
        tokens = _tokens(source, tokenizer, cap)
        corpus = Corpus(source, tokens)
        if source.kind != "recall" and len(corpus.train) < min_length:
            raise UserError(
                f"The source {source.label()} has only {len(corpus.train):,} training tokens, fewer than a sequence of "
                f"{min_length}; give more text or a smaller --set stages.seq_len."
            )
        if len(tokens) and int(tokens.max()) >= vocab_size:
            raise UserError(f"The source {source.label()} holds token {int(tokens.max())}, but the model embeds only {vocab_size}.")
        corpora.append(corpus)
    return TrainingData(corpora, tokenizer, seed)


def check_sources(sources: Iterable[Source]) -> None:
    """Looks for the files and folders of sources; data sets are asked for when they are read.

    Raises:
        UserError: one that is not there or holds no text.
    """
    for source in sources:
        if source.kind == "text":
            documents(source)
        elif source.kind == "corpus":
            _sampled(Path(source.where))


def _tokens(source: Source, tokenizer: Any, cap: int) -> np.ndarray:
    if source.kind == "recall":
        return np.zeros(0, dtype=np.int32)
    if source.kind == "corpus":
        return _sampled(Path(source.where))
    separator = tokenizer.eos_token_id
    parts: list[np.ndarray] = []
    found = 0
    for texts in _batched(documents(source), 64):
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(np.asarray([*ids, separator], dtype=np.int32))
            found += len(ids) + 1
        if found >= cap:
            break
    return np.concatenate(parts)[:cap] if parts else np.zeros(0, dtype=np.int32)


def _sampled(folder: Path) -> np.ndarray:
    file = folder / "tokens.npy"
    if not file.is_file():
        raise UserError(f"{folder} holds no tokens.npy; `bench sample --model M --out {folder}` makes one.")
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _batched(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    read = 0
    for text in texts:
        batch.append(text)
        read += len(text)
        if len(batch) == size or read > MAX_CHARACTERS:
            yield batch
            batch = []
        if read > MAX_CHARACTERS:
            return
    if batch:
        yield batch
