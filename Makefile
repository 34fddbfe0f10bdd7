PYTHON ?= .venv/bin/python

check:  ## lint, types, import directions, tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)
	$(dir $(PYTHON))lint-imports
	$(PYTHON) -m pytest -m "not slow and not gpu"

test-slow:  ## minutes long
	$(PYTHON) -m pytest -m slow

test-gpu:  ## needs a CUDA device; pytest-benchmark, where installed, would warn beside pytest-xdist
	$(PYTHON) -m pytest -p no:benchmark -m gpu tests

.PHONY: check test-slow test-gpu
