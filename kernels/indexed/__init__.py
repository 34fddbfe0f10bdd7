"""Softmax attention to some of the keys: bands, static patterns, chosen blocks, and one token's cache."""
