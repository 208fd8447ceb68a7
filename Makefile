# `make serve` and `make test` set up all they need: a virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ADDRESS ?= 127.0.0.1:5000

.PHONY: serve test bench check sslyze clean

serve: $(VENV)/serve.stamp  ## the echo server on 127.0.0.1:5000
	exec $(BIN)/gtcpserver echo --bind $(ADDRESS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sslyze:  ## in an environment of its own: it wants an older cryptography. Its test is skipped without it
	$(PYTHON) -m venv .venv-sslyze
	.venv-sslyze/bin/python -m pip install --quiet --disable-pip-version-check 'sslyze>=6'

bench: $(VENV)/bench.stamp  ## about 10 minutes; needs wrk from the system's packages
	$(BIN)/python -m loadtests.bench

$(VENV)/serve.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cli]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/serve.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(VENV)/bench.stamp: $(VENV)/serve.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) .venv-sslyze build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
