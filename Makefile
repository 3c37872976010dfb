# `make demo` and `make test` build .venv by themselves; everything else runs inside it, `make oldest` and
# `make gpu-rehearsal` beside it, and `make gpu` in whatever environment the machine has.
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
# all cores for the process that runs; tests and loader workers set their own
export OMP_NUM_THREADS ?= $(shell nproc)

.PHONY: demo test oldest gpu gpu-rehearsal hear common space browser quality style clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)" numpy  # torch first, so that nothing pulls another build of it
	$(PIP) --editable ".[test]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/python examples/demo.py --output_dir "$(OUT)" $(if $(AUDIO),--audio "$(AUDIO)")

test: $(VENV)/ready
	$(BIN)/python -m pytest

# the oldest transformers that pyproject.toml admits, in an environment of its own; constraints.txt names the newest
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

# checks, figures and some minutes of training on a GPU; the package need not be installed
gpu:
	PYTHONPATH=. $(GPU_PYTHON) examples/benchmarks/gpu.py --output_dir "$(GPU_OUT)" $(GPU_OPTIONS)

# `make gpu` at toy sizes on a CPU, twice, with transformers 5.17 and without datasets, evaluate, soundfile and soxr;
# the code is found by its path, since installing it would bring the last two
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
		PYTHONPATH=. OMP_NUM_THREADS=1 $(REHEARSAL)/bin/python examples/benchmarks/gpu.py --quick --output_dir $(REHEARSAL)/results || exit 1; \
	done

# the HEAR benchmark's own validator, beside the environment: it asks for tensorflow, which it does not need
hear: $(VENV)/ready
	$(PIP) --no-deps --upgrade --target $(VENV)/hear hearvalidator==2021.0.2
	PYTHONPATH=$(VENV)/hear $(BIN)/python -m pytest tests/evaluation/test_hear.py -k validator

# transformers' own common tests, which only its source distribution holds; they use marks that are not ours
common: SOURCE := $(VENV)/transformers-source
common: $(VENV)/ready
	$(PIP) parameterized
	rm -rf $(SOURCE) && mkdir $(SOURCE)
	$(BIN)/pip download --quiet --no-deps --no-binary transformers --dest $(SOURCE) \
		"$$($(BIN)/pip freeze | grep '^transformers==')"
	tar --extract --gzip --strip-components 1 --directory $(SOURCE) --file $(SOURCE)/transformers-*.tar.gz
	TRANSFORMERS_SOURCE=$(SOURCE) $(BIN)/python -m pytest tests/common --override-ini addopts=--import-mode=importlib \
		-rs -W ignore::pytest.PytestUnknownMarkWarning

# a page in the browser, to try a checkpoint on a sound
space: $(VENV)/ready
	$(PIP) --editable ".[space]"
	$(BIN)/python examples/space/app.py --model "$(MODEL)"

# that page in headless Chromium; skipped with a message where Debian's chromium and chromium-driver are not installed
browser: $(VENV)/ready
	$(PIP) --editable ".[space]" selenium
	$(BIN)/python -m pytest tests/examples/test_space.py

quality: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) $(REHEARSAL) build dist *.egg-info
