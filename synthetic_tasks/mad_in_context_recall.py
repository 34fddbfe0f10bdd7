"""MAD in-context recall: repeat the value of a key seen before in the sequence (Poli et al. 2024, athms/mad-lab)."""

from __future__ import annotations

from typing import Literal

from synthetic_tasks._base import task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._mad_recall import MADRecall


@task("mad_in_context_recall", suite="mad")
class MADInContextRecall(MADRecall):
    """In-context recall with the published sizes: vocabulary 16, length 128.

    MAD varies one factor at a time: vocab_size 32, 64, 128; length 256, 512, 1024; examples 6400, 3200, 1600, 800.

    Args:
        train_cells: cells of the training split, length : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default with lengths beyond the trained one.
        vocab_size: number of token ids, half of them keys.
        compat: "mad" labels every next token in training, as published; "none" labels answers only.
    """

    def __init__(
        self,
        *,
        train_cells: str = "128:12800",
        valid_cells: str = "",
        test_cells: str = "128:1280+256:320+512:160",
        vocab_size: int = 16,
        compat: Literal["none", "mad"] = "none",
    ) -> None:
        self.full_loss = compat == "mad"
        self._prepare(vocab_size, parse_splits(("length",), train=train_cells, valid=valid_cells, test=test_cells))
