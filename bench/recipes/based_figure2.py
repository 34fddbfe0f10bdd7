"""Based, Figure 2: recall against state for BASED, attention, windows, Mamba, H3 and Hyena on the mixture of MQAR cells.

Command: `bench synthetic --recipe based_figure2 --check --device cuda`
One selection seed and one reported seed: add `--select-seeds 1 --seeds 1`.

36 models of two layers without MLP. Four learning rates on three selection seeds, three reported seeds: 540 runs; 180 with one
of each. Runs that `readme_plot` has in common are shared through the store.
Cost: not measured in one go; 34 of the 36 models have run with one of each seed (docs/task_figures.md).

The protocol is that of `readme_plot`, with the same changes. The figure charges no short convolution: its bytes are 12 a
channel below our published count. Widths, feature and state sizes are inferred from the bytes; Mamba above 64 KiB is left out
for want of that.

Expect attention at 1.0, BASED from 0.54 at 6 KB to 0.99 at 160 KB, Mamba from 0.57 at 8 KB to 0.8 at 64 KB, windows exactly as
good as their reach, and H3 and Hyena below 0.5 (published 0.51 for Hyena at 4 MB).
"""

from bench.recipes import recipe
from bench.recipes._mixture import SLIDING, mixture
from bench.sweep import Sweep

BASED = ((32, 8), (64, 8), (128, 8), (256, 8), (512, 8), (64, 16), (128, 16), (256, 16), (512, 16), (64, 24), (512, 24))
MAMBA = ((64, 8), (64, 16), (128, 8), (128, 16), (256, 8), (128, 24), (256, 16))
"""Width and feature dimension; width and state size."""
WIDTHS = (64, 128, 256, 512)


@recipe("based_figure2")
def based_figure2() -> Sweep:
    """Every point of the figure whose size is known."""
    models = [
        *(("attention", width) for width in (64, 128)),
        *SLIDING,
        *((f"based:feature_dim={f}", width) for width, f in BASED),
        *((f"mamba:d_state={n}*2", width) for width, n in MAMBA),
        *((f"h3:d_state={width // 4}*2", width) for width in WIDTHS),
        *(("hyena:train_features=true*2", width) for width in WIDTHS),
    ]
    return Sweep(experiments=mixture(models), select_seeds=3, seeds=3)
