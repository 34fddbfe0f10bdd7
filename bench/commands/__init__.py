"""What the commands do; `bench.cli` only parses and dispatches."""
