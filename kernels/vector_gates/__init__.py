"""Recurrences with a decay per key channel, the delta rule and RWKV-7 among them."""
