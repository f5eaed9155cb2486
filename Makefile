# Each of these sets up .venv first; from the second time on that is instant:
#   make venv              nothing else
#   make demo              answers the shipped questions with the shipped model, and makes a page to look at
#   make test              every test that needs no GPU
#   make check             format, lint, types, imports
#   make bench             the CPU benchmarks
#   make gpu               on a CUDA machine: its tests, then its benchmarks
#
# PYTHON=python3.12        the interpreter the environment is made with (3.11 or newer; found if not given)
# TORCH_INDEX=URL          an extra package index for torch, for example https://download.pytorch.org/whl/cpu
#                          (without it, PyPI's build is taken, which on Linux carries the CUDA libraries: 3 GB)
# PYTEST_ARGS=tests/repo   what `make test` runs;  JOBS=4  in how many processes
# SUITES="patchify"        what `make bench` runs; BENCH_ARGS=--quick
# make test-oldest         the tests with the oldest versions that pyproject.toml allows, in an environment of its own
# make bench-peers         the suites that compare with other projects, in an environment that has them (benchmarks/peers)
VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
JOBS  ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)
PYTEST_ARGS ?=
BENCH_ARGS ?=
# without the environment of the peers (benchmarks/peers), trl_grpo runs only where it is asked for by name, and says so
SUITES ?= $(filter-out gpu_% $(if $(wildcard $(PEERS_VENV)/.installed),,trl_grpo),$(basename $(notdir $(wildcard benchmarks/suites/[a-z]*.py))))
PEER_SUITES := patchify grpo_loss
GPU_SUITES ?= $(basename $(notdir $(wildcard benchmarks/suites/gpu_*.py)))
PYTHON_CODE := vtengine kernels training benchmarks tests examples setup.py
SOURCES := $(shell find csrc -type f 2>/dev/null)

export PYTHON TORCH_INDEX

.PHONY: help venv demo test check format bench bench-peers report gpu oldest-venv test-oldest sglang-venv vllm-venv peers-venv gpu-sglang test-sglang clean
help:
	@sed -n '/^VENV/q; s/^# \{0,1\}//p' Makefile

venv: $(STAMP)
$(STAMP): pyproject.toml setup.py constraints.txt .ci/venv $(SOURCES)
	@.ci/venv $(VENV)
	@touch $@

demo: $(STAMP)
	$(PY) examples/demo.py

TEST := -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) $(TEST)

OLDEST_VENV := .venv-oldest
oldest-venv: $(OLDEST_VENV)/.installed
$(OLDEST_VENV)/.installed: pyproject.toml setup.py tests/oldest.sh $(SOURCES)
	@tests/oldest.sh $(OLDEST_VENV)
	@touch $@

test-oldest: oldest-venv
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python $(TEST)

check: $(STAMP)
	$(PY) -m ruff format --check $(wildcard $(PYTHON_CODE))
	$(PY) -m ruff check $(wildcard $(PYTHON_CODE))
	$(PY) -m mypy
	PYTHONPATH=.:kernels:training $(PY) -c 'from importlinter.cli import lint_imports_command as main; main()'
	$(PY) -m pytest -q tests/repo/test_budget.py

format: $(STAMP)
	$(PY) -m ruff format $(wildcard $(PYTHON_CODE))
	$(PY) -m ruff check --fix $(wildcard $(PYTHON_CODE))

bench: $(STAMP)
	@set -e; $(foreach suite,$(SUITES),$(call python_for,$(suite)) benchmarks/run.py --suite $(suite) $(BENCH_ARGS);)
	$(PY) benchmarks/report.py

# an environment with what benchmarks/peers lists, and the Python of a suite: that one's, where it is there and wanted
PEERS_VENV := .venv-peers
python_for = $(if $(and $(filter $(1),$(PEER_SUITES)),$(wildcard $(PEERS_VENV)/.installed)),$(PEERS_VENV)/bin/python,$(PY))
peers-venv: $(PEERS_VENV)/.installed
$(PEERS_VENV)/.installed: constraints.txt $(wildcard benchmarks/peers/*)
	@benchmarks/peers/install.sh $(PEERS_VENV)
	@touch $@

bench-peers: peers-venv
	@$(MAKE) bench SUITES="$(PEER_SUITES)"

report: $(STAMP)
	$(PY) benchmarks/report.py

# Without a network too, where torch, Triton, pytest and hypothesis are installed. What fails does not keep the rest from
# running: a suite's numbers are written if all tests passed, or else if its own do. GPU_TESTS= and GPU_SUITES= choose;
# PYTEST_ARGS='-n 1' for a GPU with little memory.
GPU_STAMP := $(VENV)/.installed-for-gpu
$(GPU_STAMP): pyproject.toml setup.py .ci/venv $(SOURCES)
	@.ci/venv $(VENV) gpu
	@touch $@

GPU_TESTS ?= $(shell grep -rlE --include='test_*.py' '^@pytest.mark.gpu|marks=pytest.mark.gpu' tests)
gpu: $(if $(wildcard $(STAMP)),$(STAMP),$(GPU_STAMP))
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    failed=; gate=--no-gate; $(PY) -m vtengine.cli doctor || failed="$$failed doctor"; \
	    $(PY) -m pytest -m gpu -n 4 --dist loadfile $(PYTEST_ARGS) $(GPU_TESTS) || { failed="$$failed tests"; gate=; }; \
	    for suite in $(GPU_SUITES); do \
	        $(PY) benchmarks/run.py --suite $$suite $$gate $(BENCH_ARGS) || failed="$$failed $$suite"; \
	    done; \
	    if [ -n "$$failed" ]; then echo "make gpu: failed:$$failed" >&2; exit 1; fi; \
	else \
	    echo 'make gpu: no CUDA device seen by torch. Skipped: the tests marked gpu$(if $(GPU_SUITES),; the benchmarks $(GPU_SUITES)).'; \
	fi

# a real SGLang on the CPU in an environment of its own (2.7 GB), and the tests that need it;
# SGLANG_MARKS='sglang and not slow' leaves out the long ones; SGLANG_VERSION=0.5.23 takes another one than the pin
SGLANG_VENV := .venv-sglang$(addprefix -,$(SGLANG_VERSION))
SGLANG_MARKS ?= sglang
sglang-venv: $(SGLANG_VENV)/.installed
$(SGLANG_VENV)/.installed: $(wildcard tests/sglang_env/*) pyproject.toml
	@tests/sglang_env/install.sh $(SGLANG_VENV)
	@touch $@

test-sglang: $(STAMP) sglang-venv
	OMP_NUM_THREADS=1 $(SGLANG_VENV)/bin/python -m pytest -m '$(SGLANG_MARKS)' $(or $(PYTEST_ARGS),tests/engine/sglang/test_real.py tests/repo/test_recipes.py)

# vLLM on the CPU (2.3 GB), a peer in the suite backends
VLLM_VENV := .venv-vllm
vllm-venv: $(VLLM_VENV)/.installed
$(VLLM_VENV)/.installed: $(wildcard benchmarks/vllm_env/*) tests/sglang_env/on_cpu.sh
	@benchmarks/vllm_env/install.sh $(VLLM_VENV)
	@touch $@

# two turns of a model of the size of CONFIG (a folder with config.json; its weights are random) through SGLang on a GPU;
# PYTHON= an interpreter that has SGLang, where .venv has none
CONFIG ?=
gpu-sglang:
	$(or $(PYTHON),$(wildcard $(PY)),python3) benchmarks/gpu_sglang.py $(if $(CONFIG),--config $(CONFIG)) $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(OLDEST_VENV) .venv-sglang* $(VLLM_VENV) $(PEERS_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
