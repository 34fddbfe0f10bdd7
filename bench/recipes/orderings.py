"""Three orderings that the literature reports: negative eigenvalues, length extrapolation of softmax, and selectivity.

Command: `bench synthetic --recipe orderings --device cuda --jobs 4`

Parity (Grazzi et al. 2025): DeltaNet whose beta may reach 2 flips its state and solves parity beyond the trained lengths; with
beta below 1 it cannot. Trained at lengths 8, 16 and 40 (the paper: 3 to 40), tested to 256; Gated DeltaNet likewise.

Words of S5 (Merrill et al. 2024) written in swaps: softmax attention of fixed depth learns the shortest words and fails on
longer ones, trained or not. Trained at lengths 2, 4 and 8, tested to 64. A swap is one reflection, which a write of DeltaNet
with negative eigenvalues makes, so it is the control that learns them; an arbitrary element of S5 may need four (Siems et al.
2025), and with those as tokens nothing learnt anything.

Selective copying (Gu & Dao 2023): Mamba, whose step depends on the token, against S4D, whose step does not, and Hyena, whose
convolutions do not but whose gates do. Published at 4,096 tokens and 400,000 steps: Mamba 99.8, Hyena 30.1 and S4 57.0 in H3's
block, S4 18.3. Here 8 data tokens in up to 128, with shorter cells to start from, tested to 512.

Two layers of width 64 with SwiGLU, two learning rates on one selection seed, four reported seeds: 66 runs of 3,000 (parity),
10,000 (words) and 9,000 steps (copying), 270 s of one H200 with BENCH_COMPILE=0. Measured: docs/task_figures.md. The papers
train 20,000 steps of 256 on parity, 500 epochs of up to 1M words on S5, widths of 128 and 512. In fp32: state tracking at
lengths never trained magnifies rounding.
"""

from bench.grammar import named_layers
from bench.recipes import recipe
from bench.spec import ModelSpec, TaskSpec, TrainSpec
from bench.sweep import Experiment, Sweep

ATTENTION = "attention:n_heads=4:positions=rotary"
FLIPPING = "delta_net:n_heads=4:negative_eigenvalues=true"
ROWS = {
    "parity": (
        FLIPPING,
        "delta_net:n_heads=4",
        "gated_delta_net:n_heads=4:negative_eigenvalues=true",
        "gated_delta_net:n_heads=4",
        ATTENTION,
    ),
    "swaps": (FLIPPING, "delta_net:n_heads=4", ATTENTION),
    "selective_copy": ("mamba", "hyena", "s4d"),
}
"""Mixers of each task."""

EPOCHS = {"parity": 3, "swaps": 10, "selective_copy": 9}
"""Passes over the training split; one is a thousand steps of 64 sequences."""


@recipe("orderings")
def orderings(*, examples: int = 64_000, lrs: tuple[float, ...] = (1e-3, 3e-3), seeds: int = 4) -> Sweep:
    """All three orderings.

    Args:
        examples: training sequences of a task, over all its cells.
        lrs: learning rates to choose from.
        seeds: reported seeds.
    """
    tasks = _tasks(examples)
    experiments = tuple(
        Experiment(task=tasks[name], model=_model(mixer), train=_train(EPOCHS[name]), lrs=lrs)
        for name, mixers in ROWS.items()
        for mixer in mixers
    )
    return Sweep(experiments=experiments, seeds=seeds)


def _train(epochs: int) -> TrainSpec:
    return TrainSpec(
        batch_size=64, epochs=epochs, schedule="cosine", warmup_steps=100, shuffle="batches", stop_at=None, precision="fp32"
    )


def _model(mixer: str) -> ModelSpec:
    return ModelSpec(**named_layers(f"{mixer}*2"), d_model=64, frame="prenorm", mlp_ratio=2.0, embed_dropout=0.0)


def _tasks(examples: int) -> dict[str, TaskSpec]:
    quarter, half = examples // 4, examples // 2
    parity = {
        "train_cells": f"8:{quarter}+16:{quarter}+40:{half}",
        "valid_cells": "40:500",
        "test_cells": "40:500+64:500+128:500+256:500",
    }
    swaps = {
        "group": "S5",
        "moved": 2,
        "train_cells": f"2:{quarter}+4:{quarter}+8:{half}",
        "valid_cells": "8:500",
        "test_cells": "4:500+8:500+16:500+32:500+64:500",
    }
    copying = {
        "train_cells": f"16x4:{quarter}+32x8:{quarter}+64x8:{quarter}+128x8:{quarter}",
        "valid_cells": "128x8:500",
        "test_cells": "64x8:500+128x8:500+256x8:500+512x8:500",
    }
    return {
        "parity": TaskSpec(name="parity", options=parity),
        "swaps": TaskSpec(name="group_word", options=swaps),
        "selective_copy": TaskSpec(name="selective_copy", options=copying),
    }
