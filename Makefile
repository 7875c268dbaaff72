PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2  # processes that run tests

.PHONY: quickstart demo test test-all lint clean

quickstart: $(VENV)/.installed  ## train a small elastic model on scenes of real digits and open the trade-off (6 minutes)
	OMP_WAIT_POLICY=ACTIVE $(BIN)/elit quickstart --out runs/quickstart

demo: $(VENV)/.installed  ## serve the model of the quickstart, which is trained first where there is none (3 minutes)
	OMP_WAIT_POLICY=ACTIVE $(BIN)/elit train --config configs/train/scenes.yaml --out runs/quickstart/run
	$(BIN)/elit serve --model runs/quickstart/run --name digits --steps 16 --guidance ccfg --guidance-scale 2 \
		--latency-objective-ms 2000

test: $(VENV)/.installed lint  ## lint, types and all tests but the slow ones
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --cov --cov-report=term -m "not slow"

test-all: $(VENV)/.installed lint  ## lint, types and all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
