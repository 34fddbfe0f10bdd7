"""Linear attention with Taylor features that are never written to memory."""
