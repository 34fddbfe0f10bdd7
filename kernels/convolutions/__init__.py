"""Short, gated and long causal convolutions."""
