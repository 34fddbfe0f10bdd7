"""Training data of the tests' text."""

from pathlib import Path

from bench.convert.data import TrainingData, load_data
from bench.convert.spec import Source


def data_of(text: Path, tokenizer, **weights: float) -> TrainingData:
    """The text and other kinds of sources with their weights, for a vocabulary of 280."""
    sources = [Source(kind="text", where=str(text)), *(Source(kind=kind, weight=weight) for kind, weight in weights.items())]
    return load_data(sources, tokenizer, 280, 0, min_length=48, cap=10**6)
