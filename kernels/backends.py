"""Names of the forms that operations have, and of the variable that forces one; without torch, so that commands can look."""

BACKENDS = ("reference", "chunked", "triton")
TWO = ("chunked", "triton")
"""Forms of an operation that plain torch defines."""
VARIABLE = "MIXER_BENCH_BACKEND"
