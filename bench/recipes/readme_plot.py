"""Zoology's recall-memory plot: eleven mixers from 5 KB to 2 MB of state on the mixture of MQAR cells.

Command: `bench synthetic --recipe readme_plot --check --device cuda`
One selection seed and one reported seed: add `--select-seeds 1 --seeds 1`.

65 models of two layers without MLP: attention, windows, BASED, Mamba, Mamba-2, DeltaNet, Gated DeltaNet, GLA, RWKV-7, Hyena and
H3 at the published widths and state sizes. Four learning rates on three selection seeds, three reported seeds: 975 runs; 325
with one of each. A run reads at most 778 million tokens in 22,624 steps, fewer if it passes 0.99 on validation.
Cost: not measured in one go. An estimated 61.4 + 21.5 minutes of one H200 with one of each seed, for the four learning rates and
for the reported runs, by tests/benchmarks/recipe_cost.py from steps that were timed at its widths; 59.4 + 19.0 at the epochs that
runs took before they passed 0.99 (docs/task_figures.md).

As published: mixture, generator, sizes, block, initialisation, tied head, embedding dropout, AdamW with its weight decay,
batch, epochs, schedule, order of batches, learning rates, test cells; state is counted as published in the column of that name.
Changed: the learning rate is chosen, and training stopped, on validation draws (200 of each test cell) instead of the test set;
test scores come from seeds that took no part in that; bf16 autocast on a GPU instead of fp32; attention weights are not dropped
out.

Expect attention at 1.0 and, at equal bytes, the order of results/published/readme_plot_orders.csv: the delta rules, then GLA,
then the state-space models, then windows. Hyena and H3 stay below 0.5 at any size.
"""

from bench.recipes import recipe
from bench.recipes._mixture import SLIDING, mixture
from bench.sweep import Sweep

BASED = {48: (8, 16, 24), 64: (8, 16, 24, 32, 64), 128: (8, 16, 24, 32, 64), 256: (16, 32, 64)}
"""Feature dimensions at each width."""
WIDTHS = (64, 128, 256)
FOR_EACH_WIDTH = (
    *(f"{mixer}:d_state={n}*2" for mixer in ("mamba", "mamba2") for n in (8, 16, 24)),
    "delta_net:n_heads=2",
    "gated_delta_net:n_heads=2",
    "gla:n_heads=2",
    "rwkv7",
    "hyena:train_features=true*2",
    "h3:d_state=1024*2",
)

SOFT = ("mamba:", "hyena", "h3")
"""Mixers whose published points are soft targets."""


@recipe("readme_plot")
def readme_plot() -> Sweep:
    """Every point of the plot whose mixer the zoo has; hard targets first, and narrow models, which take less time."""
    models = [
        *(("attention", width) for width in (64, 128)),
        *SLIDING,
        *((f"based:feature_dim={f}", width) for width, features in BASED.items() for f in features),
        *((mixer, width) for mixer in FOR_EACH_WIDTH for width in WIDTHS),
        *((f"h3:d_state={width // 4}*2", width) for width in WIDTHS),
    ]
    models.sort(key=lambda model: (model[0].startswith(SOFT), model[1]))
    return Sweep(experiments=mixture(models), select_seeds=3, seeds=3)
