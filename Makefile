# The everyday commands. Needs Python >= 3.11, make and git; all else comes with `make setup`.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
SEEDS ?= 0-4

.DEFAULT_GOAL := help
# Tests and benchmarks side by side would fight for the cores and spoil each other's timings.
.NOTPARALLEL:
.PHONY: help setup sweep test test-slow torture lint bench lock

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' Makefile | awk -F @ '{ printf "%-18s%s\n", $$1, $$2 }'

setup: ## make .venv from requirements.lock; a moment when it is there already
	@command -v "$(PYTHON)" > /dev/null || { echo "setup: there is no '$(PYTHON)' - Python 3.11 or newer is" \
		"needed - install one, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" setup_env.py

sweep: setup ## FID against the mask ratio on the embedded digits
	$(VENV_PYTHON) sweeps/mask_ratio.py

test: setup ## the fast tests
	$(VENV_PYTHON) -m pytest -m "not slow" -n logical --maxprocesses 4 --dist loadfile

test-slow: setup ## the other tests: clusters, faults, a browser
	$(VENV_PYTHON) -m pytest -m "slow and not torture" --durations=20

torture: setup ## what repeats slow tests at length: random kills, stopped cells, outages that last; SEEDS=0-49
	$(VENV_PYTHON) -m pytest -m torture
	$(VENV_PYTHON) tests/torture/faults.py --seeds $(SEEDS)

lint: setup ## ruff and mypy
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy

bench: setup ## speed and overhead, against what one would use instead
	$(VENV_PYTHON) -m benchmarks

lock: ## pin the dependencies anew after a change to pyproject.toml (to upgrade all, delete requirements.lock first)
	@"$(PYTHON)" setup_env.py lock
