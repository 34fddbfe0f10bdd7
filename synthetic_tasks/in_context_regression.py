"""In-context regression: predict y of a new x from the pairs (x, y) seen so far.

Our specification of the test-time regression probes of local linear attention (Zuo et al. 2025) and of in-context linear
regression (Garg et al. 2022). The exact solver is the Bayes predictor; its error is the floor.
Shape legend: N examples, T length, n pairs, q queries, d dimensions of x, k of y, R regions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

import numpy as np

from synthetic_tasks._base import Batch, Cell, Task, stream, task
from synthetic_tasks._cells import parse_splits
from synthetic_tasks._metrics import measured, score


def _length(axes: Mapping[str, int]) -> int:
    """Pairs, then a quarter as many queries, at least four."""
    return axes["pairs"] + max(4, axes["pairs"] // 4)


@task("in_context_regression", suite="recall")
class InContextRegression(Task):
    """In-context linear regression with real inputs and outputs.

    Frames are [x; y; 0] for pairs and [x; 0; 1] for queries, which all come after the pairs; labels are the noisy y of queries.
    x ~ N(0, C), y = W x + noise, W with independent N(mean, 1/d) entries, drawn for each sequence. `Task.ceilings` are mean
    squared errors: "exact" of the Bayes predictor, "predict zero", and a d by k memory without the covariance of x.

    Args:
        train_cells: cells of the training split, pairs : examples.
        valid_cells: the same for the validation split, which otherwise has the cells of the test split.
        test_cells: the same for the test split; by default with more pairs than in training.
        dim: d.
        target_dim: k.
        noise: standard deviation of the noise on y; 0, 0.1 and 0.5 are our settings.
        kind: "fixed" is one W a sequence with mean 0; "nonzero_mean" gives all W a common mean, fixed by the task; "piecewise" is
            piecewise linear in x, one W for each sign of its first entry; "switching" draws W anew every 2 d pairs, and queries
            ask for the last one.
        condition: condition number of C: 1 is isotropic; 10 and 100 spread its eigenvalues geometrically.
    """

    input_kind = "features"
    target_kind = "real"

    def __init__(
        self,
        *,
        train_cells: str = "16:8000+32:8000+64:8000",
        valid_cells: str = "",
        test_cells: str = "8:500+16:500+32:500+64:500+128:500",
        dim: int = 8,
        target_dim: int = 1,
        noise: float = 0.1,
        kind: Literal["fixed", "nonzero_mean", "piecewise", "switching"] = "fixed",
        condition: float = 1.0,
    ) -> None:
        self.vocab_size = 1
        self.dim, self.value_dim, self.noise, self.kind, self.condition = dim, target_dim, noise, kind, condition
        self.feature_dim = dim + target_dim + 1
        if min(dim, target_dim) < 1 or noise < 0 or condition < 1:
            raise ValueError(f"dim={dim} and target_dim={target_dim} start at 1, noise={noise} at 0 and condition={condition} at 1")
        self._cells = parse_splits(("pairs",), train=train_cells, valid=valid_cells, test=test_cells, length=_length)
        for cell in itertools.chain(*self._cells.values()):
            if cell.axes["pairs"] < 2:
                raise ValueError(f"cell {cell.name} has {cell.axes['pairs']:g} pair; use at least 2")
        self.scales = condition ** -(np.arange(dim) / max(dim - 1, 1) / 2)
        mean = stream(0, "regression-mean").standard_normal((dim, target_dim)) * 2 / np.sqrt(dim)
        self.mean = mean if kind == "nonzero_mean" else np.zeros_like(mean)

    def cells(self, split: str) -> tuple[Cell, ...]:
        """See `Task.cells`."""
        return self._cells[split]

    def _region(self, x: np.ndarray, pairs: int) -> np.ndarray:
        """Which W applies at each frame, [N, T]."""
        if self.kind == "piecewise":
            return (x[..., 0] > 0).astype(np.int64)
        if self.kind == "switching":
            segment = np.minimum(np.arange(x.shape[1]), pairs - 1) // (2 * self.dim)
            return np.broadcast_to(segment, x.shape[:2])
        return np.zeros(x.shape[:2], dtype=np.int64)

    def sample(self, cell: Cell, examples: int, rng: np.random.Generator) -> Batch:
        """See `Task.sample`."""
        pairs = int(cell.axes["pairs"])
        x = rng.standard_normal((examples, cell.length, self.dim)) * self.scales
        region = self._region(x, pairs)
        maps = rng.standard_normal((examples, int(region.max()) + 1, self.dim, self.value_dim)) / np.sqrt(self.dim) + self.mean
        every = np.einsum("ntd,nrdk->ntrk", x, maps)
        y = np.take_along_axis(every, region[..., None, None], axis=2)[:, :, 0]
        y += self.noise * rng.standard_normal(y.shape)
        features = np.zeros((examples, cell.length, self.feature_dim), dtype=np.float32)
        features[..., : self.dim] = x
        features[:, :pairs, self.dim : -1] = y[:, :pairs]
        features[:, pairs:, -1] = 1
        mask = np.zeros(region.shape, dtype=bool)
        mask[:, pairs:] = True
        zeros = np.zeros(region.shape, dtype=np.int32)
        return Batch(zeros, zeros.copy(), mask, features=features, values=y.astype(np.float32))

    def solve(self, batch: Batch) -> np.ndarray:
        """The Bayes predictor: ridge regression around the prior mean, on the pairs of the query's own region."""
        x, y, pairs, region = self._read(batch)
        out = np.zeros((*x.shape[:2], self.value_dim))
        for r in range(int(region.max()) + 1):
            used = (region[:, :pairs] == r)[..., None] * x[:, :pairs]
            # A tiny noise keeps the noiseless case, which is the limit, well conditioned.
            gram = used.transpose(0, 2, 1) @ used + max(self.noise, 1e-4) ** 2 * self.dim * np.eye(self.dim)
            residual = used.transpose(0, 2, 1) @ (y - x[:, :pairs] @ self.mean)
            predicted = x @ (np.linalg.solve(gram, residual) + self.mean)
            out = np.where((region == r)[..., None], predicted, out)
        return out.astype(np.float32)

    def _read(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
        """The x of all frames, y of the pairs, number of pairs, and region of each frame."""
        assert batch.features is not None
        features = batch.features.astype(np.float64)
        pairs = int((features[0, :, -1] == 0).sum())
        x = features[..., : self.dim]
        return x, features[:, :pairs, self.dim : -1], pairs, self._region(x, pairs)

    def shortcuts(self, batch: Batch) -> dict[str, np.ndarray]:
        """Predicting zero, and the uncorrected memory sum of x y^T (linear attention), scaled to fit the labels best."""
        x, y, pairs, _ = self._read(batch)
        memory = x @ (x[:, :pairs].transpose(0, 2, 1) @ y) / pairs
        labels = batch.values[batch.mask].ravel() if batch.values is not None else np.zeros(1)
        guess = memory[batch.mask].ravel()
        scale = (guess @ labels) / max(guess @ guess, 1e-30)
        return {"predict zero": np.zeros_like(memory, dtype=np.float32), "additive memory": (scale * memory).astype(np.float32)}

    def extra_metrics(self, cell: Cell, batch: Batch, predictions: np.ndarray) -> dict[str, float]:
        """Error above the Bayes predictor's as a share of that of predicting zero: 0 is optimal, 1 is no better than zero."""
        del cell
        least, zero = score(self.solve(batch), batch), score(np.zeros_like(predictions), batch)
        return {"excess error": (score(predictions, batch) - least) / (zero - least)}

    def ceilings(self, cell: Cell) -> dict[str, float]:
        """Mean squared errors, measured: lower is better; excess error is (error - exact) / (predict zero - exact)."""
        return measured(self, cell, 512, exact=True)

    def bits_needed(self, cell: Cell) -> float:
        """Scalars an exact online solver keeps, at 32 bits: the Gram matrix and the d by k moment, for each live region.

        Real numbers have no finite entropy; this is the size of the sufficient statistic, not a bound.
        """
        del cell
        regions = 2 if self.kind == "piecewise" else 1
        return 32.0 * regions * (self.dim * (self.dim + 1) // 2 + self.dim * self.value_dim)
