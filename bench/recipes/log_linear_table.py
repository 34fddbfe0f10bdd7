"""The MQAR table of Log-Linear Attention: Mamba-2 and Gated DeltaNet at widths 16, 32 and 64, on the trained cells.

Command: `bench synthetic --recipe log_linear_table --check --device cuda`

Six models of two layers without MLP, heads of 16, Mamba-2 with a state of 16. Four learning rates on three selection seeds,
five reported seeds: 102 runs of at most 22,624 steps.
Cost: not measured yet.

As published: the mixture, batch, epochs and learning rates of Based, five seeds, and the mean over the five trained cells as
the score. Inferred, since the paper names neither: heads and states of 16, Mamba-2 in both layers of its own block, and a short
convolution as first layer of Gated DeltaNet. Changed: as in `readme_plot`.

Published: Mamba-2 46.9 / 75.1 / 89.6, Gated DeltaNet 38.4 / 79.0 / at least 99. A third-party rerun of five seeds gives 45.6 /
75.1 / 87.3 and 64.8 / 74.7 / 89.5, with standard deviations of 5 to 15 points. Expect Mamba-2 within them, and Gated DeltaNet
nearer the rerun.
"""

from bench.recipes import recipe
from bench.recipes._mixture import mixture
from bench.spec import TaskSpec
from bench.sweep import Sweep

CELLS = ("64x4", "128x8", "256x16", "256x32", "256x64")
"""The trained cells."""
WIDTHS = (16, 32, 64)
HEAD = 16


@recipe("log_linear_table")
def log_linear_table() -> Sweep:
    """Both mixers at three widths."""
    splits = {f"{split}_cells": "+".join(f"{cell}:{n}" for cell in CELLS) for split, n in (("valid", 200), ("test", 1000))}
    task = TaskSpec(name="mqar", options={"protocol": "based_figure2", **splits})
    models = [
        *((f"mamba2:d_state={HEAD}:head_dim={HEAD}*2", width) for width in WIDTHS),
        *((f"gated_delta_net:n_heads={width // HEAD}", width) for width in WIDTHS),
    ]
    return Sweep(experiments=mixture(models, task), select_seeds=3, seeds=5)
