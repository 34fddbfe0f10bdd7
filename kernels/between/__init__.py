"""What lies between mixers and around a training step: norms, rows of attention, losses, the optimiser."""
