"""Judging language models with lm-eval: suites, offline tasks, referee rows, measurements of memory and speed."""
