"""The zoo: one file per mixer, one interface (`mixers._base`), one contract (`mixers._contract`)."""

from mixers._base import LAYER_PATTERNS, PATTERNS, REGISTRY, Caps, Layer, Mixer, State, heads, layer_pattern, mixer

__all__ = ["LAYER_PATTERNS", "PATTERNS", "REGISTRY", "Caps", "Layer", "Mixer", "State", "heads", "layer_pattern", "mixer"]
