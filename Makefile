PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

# Tests work on little data: more threads in one operation gain nothing, and on busy machines they wait for each other.
TEST_THREADS ?= 1

.PHONY: demo test test-slow fuzz lint clean

demo: $(INSTALLED)
	$(BIN)/whisper-at-cli demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -m slow

# Ten minutes of processor time for each reader of files that others wrote; what is found is left in fuzz-findings/.
FUZZ_SECONDS ?= 600

fuzz: $(INSTALLED)
	for reader in manifest ctranslate2 cache hdf5 heads sounds; do \
	    OMP_NUM_THREADS=1 nice $(BIN)/python tests/fuzz/fuzz.py $$reader --cpu-seconds $(FUZZ_SECONDS) \
	        --out benchmarks/results/fuzz-$$reader.json || exit 1; \
	done

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
