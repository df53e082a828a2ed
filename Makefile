PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

# Tests work on little data: more threads in one operation gain nothing, and on busy machines they wait for each other.
TEST_THREADS ?= 1

# Test processes; each extracts ESC-10 once for its tests, and takes 2 GB.
TEST_PROCESSES ?= 2

# ESC-10 and speech for the benchmarks that read them; without this folder those are left out.
BENCH_DATA ?= ../shared/data

.PHONY: demo test test-slow lint format coverage fuzz mutate bench bench-gpu bench-table clean

demo: $(INSTALLED)
	$(BIN)/whisper-at-cli demo

test: lint
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=worksteal

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -m slow --numprocesses=$(TEST_PROCESSES) --dist=worksteal

# Ten minutes of processor time for each reader of files that others wrote; what is found is left in fuzz-findings/.
FUZZ_SECONDS ?= 600

fuzz: $(INSTALLED)
	for reader in manifest ctranslate2 cache hdf5 heads sounds; do \
	    OMP_NUM_THREADS=1 nice $(BIN)/python tests/fuzz/fuzz.py $$reader --cpu-seconds $(FUZZ_SECONDS) \
	        --out benchmarks/results/fuzz-$$reader.json || exit 1; \
	done

# Do the tests notice faults? Over an hour on one core; MUTATE="cache --sample 330" tries fewer.
mutate: $(INSTALLED)
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python tests/mutation/mutate.py $(MUTATE) --out benchmarks/results/mutation.json

# mypy reads the package through a link of its name, since the folder of a clone may have any.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types
	ln -sfn ../.. build/types/whisper_at_cli
	$(BIN)/python -m mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only --exit-zero .
	$(BIN)/ruff format .

coverage: $(INSTALLED)
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest --cov --cov-report=term-missing

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py $(if $(wildcard $(BENCH_DATA)/esc10),--data $(BENCH_DATA))

# What is asked of a GPU, in eight minutes, by the Python that has torch for it: the environment if there is one, else
# PYTHON. Nothing is installed. BENCH_GPU="--minutes 14 --only heads-gpu" changes what is run.
BENCH_GPU ?=

bench-gpu:
	mkdir -p build/types
	ln -sfn ../.. build/types/whisper_at_cli
	PYTHONPATH="$(CURDIR)/build/types$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/bench_gpu.py \
	    $(if $(wildcard $(BENCH_DATA)/esc10),--data $(BENCH_DATA)) $(BENCH_GPU)

bench-table: $(INSTALLED)
	$(BIN)/python benchmarks/table.py

clean:
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .coverage*

# The torch that constraints.txt names is installed first and alone: a looser request may take another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep -E '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,test]"
	touch $(INSTALLED)
