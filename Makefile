PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

# Tests work on little data: more threads in one operation gain nothing, and on busy machines they wait for each other.
TEST_THREADS ?= 1

.PHONY: demo test test-slow mutate lint clean

demo: $(INSTALLED)
	$(BIN)/whisper-at-cli demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -m slow

# Do the tests notice faults? Over an hour on one core; MUTATE="cache --sample 330" tries fewer.
mutate: $(INSTALLED)
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python tests/mutation/mutate.py $(MUTATE) --out benchmarks/results/mutation.json

lint: $(INSTALLED)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) demo build *.egg-info

# The torch that constraints.txt names is installed first and alone: a looser request may take another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep -E '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,test]"
	touch $(INSTALLED)
