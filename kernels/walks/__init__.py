"""Linear attention without the delta rule: one walk over chunks, forward and back."""
