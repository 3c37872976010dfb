# `make demo` and `make test` create .venv themselves. `make oldest` and `make gpu-rehearsal` use environments of their
# own, and `make gpu` uses the machine's Python. Example: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
OLDEST := .venv-oldest
OLDEST_PIP := $(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt
REHEARSAL := .venv-gpu
REHEARSAL_PIP := $(REHEARSAL)/bin/pip install --quiet --constraint $(REHEARSAL)/constraints.txt
GPU_PYTHON ?= python3
GPU_OUT ?= examples/benchmarks/results
GPU_OPTIONS ?=
AUDIO ?=
OUT ?= demo_output
MODEL ?= model_cards/asit-tiny-pool26h-esc50
PAGE ?= build/page
PORT ?= 8000
# for the main process; the tests and the loader workers set their own number
export OMP_NUM_THREADS ?= $(shell nproc)

.PHONY: demo test test-fast oldest gpu gpu-rehearsal hear xares mteb tables int8 common space page browser quality style clean

# torch first, so that no other package pulls in another build of it
$(VENV)/torch-ready: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)" numpy
	touch $@

$(VENV)/demo-ready: $(VENV)/torch-ready pyproject.toml
	$(PIP) --editable ".[train]"
	touch $@

$(VENV)/ready: $(VENV)/torch-ready pyproject.toml
	$(PIP) --editable ".[test]"
	touch $@

# pretraining, probes, finetuning and prediction on generated sounds, or on AUDIO, a folder of class folders
demo: $(VENV)/demo-ready
	$(BIN)/python examples/demo.py --output_dir "$(OUT)" $(if $(AUDIO),--audio "$(AUDIO)")

# the whole test suite
test: $(VENV)/ready
	$(BIN)/python -m pytest

# the tests that take less than about three seconds each, in two processes
test-fast: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

# the oldest transformers that pyproject.toml admits; constraints.txt names the newest
$(OLDEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(transformers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	sed -nE 's/^ *"(transformers)>=([0-9.]+),.*/\1==\2/p' pyproject.toml >> $(OLDEST)/constraints.txt
	$(OLDEST_PIP) "$$(grep '^torch==' constraints.txt)" numpy
	$(OLDEST_PIP) --editable ".[train]" pytest pytest-timeout
	touch $@

oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest tests/test_configuration.py tests/test_feature_extraction.py tests/test_modeling.py \
		tests/test_wrong_inputs.py tests/test_pipeline.py tests/hub/test_sharing.py tests/finetuning/test_trainer_loss.py \
		tests/utils/test_time_budget.py tests/pretraining/test_trainer.py \
		-k "not pushed_on"

# checks, speed and some minutes of training on a GPU; the package need not be installed
gpu:
	PYTHONPATH=. $(GPU_PYTHON) examples/benchmarks/gpu.py --output_dir "$(GPU_OUT)" $(GPU_OPTIONS)

# `make gpu` at toy sizes on a CPU, twice, with transformers 5.17 and without datasets, evaluate, soundfile and soxr;
# PYTHONPATH rather than an installation, which would bring the last two
$(REHEARSAL)/ready: constraints.txt Makefile
	$(PYTHON) -m venv $(REHEARSAL)
	grep -E '^(torch|numpy|safetensors|accelerate)==' constraints.txt > $(REHEARSAL)/constraints.txt
	printf 'transformers==5.17.0\nhuggingface_hub==1.33.0\n' >> $(REHEARSAL)/constraints.txt
	$(REHEARSAL_PIP) "$$(grep '^torch==' constraints.txt)" numpy
	$(REHEARSAL_PIP) transformers accelerate
	touch $@

gpu-rehearsal: $(REHEARSAL)/ready
	rm -rf $(REHEARSAL)/results
	for round in 1 2; do \
		PYTHONPATH=. OMP_NUM_THREADS=1 $(REHEARSAL)/bin/python examples/benchmarks/gpu.py --quick --minutes 30 \
			--output_dir $(REHEARSAL)/results || exit 1; \
	done

# the HEAR benchmark's validator, installed without its dependencies: it requires tensorflow but does not need it here
hear: $(VENV)/ready
	$(PIP) --no-deps --upgrade --target $(VENV)/hear hearvalidator==2021.0.2
	PYTHONPATH=$(VENV)/hear $(BIN)/python -m pytest tests/evaluation/test_hear.py -k validator

# the checker and a task of X-ARES, installed without torchaudio, which its task runner imports: the test replaces it
xares: $(VENV)/ready
	$(PIP) --no-deps --upgrade --target $(VENV)/xares xares==0.1.3 loguru==0.7.3 webdataset==1.0.2 \
		braceexpand==0.1.7 pytorch-ignite==0.5.5 jiwer==4.0.0 rapidfuzz==3.14.6
	PYTHONPATH=$(VENV)/xares $(BIN)/python -m pytest tests/evaluation/test_xares.py -k public

# mteb's check of audio models and two of its tasks on generated sounds, beside the environment
mteb: $(VENV)/ready
	$(PIP) --no-deps --upgrade --target $(VENV)/mteb mteb==2.26.24 sentence-transformers==6.2.0 \
		polars==2.1.0 polars-runtime-32==2.1.0 pytrec-eval-terrier==0.5.11
	PYTHONPATH=$(VENV)/mteb $(BIN)/python -m pytest tests/evaluation/test_mteb.py -k public

# tables of embeddings in polars and DuckDB, and their search by faiss, installed beside the environment
tables: $(VENV)/ready
	$(PIP) --no-deps --upgrade --target $(VENV)/tables polars==2.1.0 polars-runtime-32==2.1.0 duckdb==2.0.1 \
		faiss-cpu==1.15.1
	PYTHONPATH=$(VENV)/tables $(BIN)/python -m pytest tests/corpus/test_embeddings.py tests/examples/test_similar.py \
		-k "polars or duckdb or index"

# int8 weights by torchao, installed beside the environment: every import of transformers loads it, and prints warnings
int8: $(VENV)/ready
	$(PIP) --no-deps --upgrade --target $(VENV)/int8 torchao
	PYTHONPATH=$(VENV)/int8 $(BIN)/python -m pytest tests/test_training_stack.py tests/examples/test_benchmarks.py -k "int8 or exported"

# transformers' common model tests, which only its source distribution contains; they use marks unknown to our pytest
common: SOURCE := $(VENV)/transformers-source
common: $(VENV)/ready
	$(PIP) parameterized
	rm -rf $(SOURCE) && mkdir $(SOURCE)
	$(BIN)/pip download --quiet --no-deps --no-binary transformers --dest $(SOURCE) \
		"$$($(BIN)/pip freeze | grep '^transformers==')"
	tar --extract --gzip --strip-components 1 --directory $(SOURCE) --file $(SOURCE)/transformers-*.tar.gz
	TRANSFORMERS_SOURCE=$(SOURCE) $(BIN)/python -m pytest tests/common --override-ini addopts=--import-mode=importlib \
		-rs -W ignore::pytest.PytestUnknownMarkWarning

# a web page that classifies a sound with the checkpoint MODEL
space: $(VENV)/torch-ready
	$(PIP) --editable ".[space]"
	$(BIN)/python examples/space/app.py --model "$(MODEL)"

# a web page that classifies sounds inside the browser, without a server of its own; needs npm
page: $(VENV)/ready
	$(BIN)/python examples/browser/build.py "$(MODEL)" "$(PAGE)"
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory "$(PAGE)" $(PORT)

# both pages in headless Chromium; skipped without Debian's packages chromium and chromium-driver, or without npm
browser: $(VENV)/ready
	$(PIP) --editable ".[space]" selenium
	$(BIN)/python -m pytest tests/examples/test_space.py tests/examples/test_browser.py

quality: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) $(REHEARSAL) build dist *.egg-info
