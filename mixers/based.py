"""BASED (Arora et al. 2024): a gated convolution, Taylor linear attention, and a small exact window, layer by layer."""

from __future__ import annotations

from mixers._base import Layer, layer_pattern


@layer_pattern("based")
def based(*, feature_dim: int = 16, n_heads: int = 1, window: int = 64, kernel_size: int = 3) -> tuple[Layer, ...]:
    """The three layers in the paper's order; Zoology's two-layer BASED is the first two.

    Args:
        feature_dim: width of queries and keys before the second-order Taylor feature map.
        n_heads: heads of both attentions.
        window: keys that the sliding window sees, the own one included.
        kernel_size: taps of the convolution.

    Returns:
        Layers to cycle over the depth of a model.
    """
    return (
        Layer("base_conv", {"kernel_size": kernel_size}),
        Layer("linear_attention", {"feature_map": "taylor2", "feature_dim": feature_dim, "n_heads": n_heads}),
        Layer("sliding_window", {"window": window, "n_heads": n_heads}),
    )
