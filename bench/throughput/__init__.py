"""How fast mixers and kernels are, beside what the device allows and what public peers do."""
