"""MAD noisy in-context recall: recall with pairs of noise tokens in between (Poli et al. 2024, athms/mad-lab)."""

from __future__ import annotations

from typing import Literal

from synthetic_tasks._base import task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._mad_recall import MADRecall


@task("mad_noisy_recall", suite="mad")
class MADNoisyRecall(MADRecall):
    """Noisy recall with the published sizes: vocabulary 32, of which 16 ids are noise, length 128, 20 % noise.

    MAD varies one factor at a time: vocab_size 48, 80, 144; length 256, 512, 1024; noise 0.4, 0.6, 0.8; examples.

    Args:
        train_cells: cells of the training split, length : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default with lengths beyond the trained one.
        vocab_size: number of token ids.
        noise_ids: how many of them are noise.
        noise: probability that a pair is replaced by two noise tokens; the probe and one other pair never are.
        compat: "mad" labels every next token in training, as published; "none" labels answers only.
    """

    def __init__(
        self,
        *,
        train_cells: str = "128:12800",
        valid_cells: str = "",
        test_cells: str = "128:1280+256:320+512:160",
        vocab_size: int = 32,
        noise_ids: int = 16,
        noise: float = 0.2,
        compat: Literal["none", "mad"] = "none",
    ) -> None:
        if not 0 <= noise < 1 or noise_ids < 1:
            raise ValueError(
                f"noise={noise} must be at least 0 and below 1, and noise_ids={noise_ids} at least 1; published 0.2 and 16"
            )
        self.full_loss, self.noise, self.noise_ids = compat == "mad", noise, noise_ids
        self._prepare(vocab_size, parse_splits(("length",), train=train_cells, valid=valid_cells, test=test_cells))
