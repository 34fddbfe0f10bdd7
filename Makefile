PYTHON ?= .venv/bin/python

check:  ## lint, types, import directions, tests: those of kernels in a process of their own, on the second core
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)
	$(dir $(PYTHON))lint-imports
	set -e; kernels=$$(mktemp); \
	$(PYTHON) -m pytest -m "not slow and not gpu" tests/kernels >$$kernels 2>&1 & beside=$$!; \
	failed=0; $(PYTHON) -m pytest -m "not slow and not gpu" --ignore=tests/kernels || failed=$$?; \
	wait $$beside || failed=$$?; cat $$kernels; rm $$kernels; exit $$failed

test-slow:  ## minutes long
	$(PYTHON) -m pytest -m slow

test-gpu:  ## needs a CUDA device; pytest-benchmark, where installed, would warn beside pytest-xdist
	$(PYTHON) -m pytest -p no:benchmark -m gpu tests  # side by side, with a record: -m tests.gpu.suite

.PHONY: check test-slow test-gpu
