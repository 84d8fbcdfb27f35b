# The verbs of the project. Every one of them sets up what it needs in .venv.
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTHON ?= python3.11

.PHONY: install lint check test bench drill fuzz soak-swaps protos demo demo-experts serve demo-model clean

install: $(STAMP)

$(STAMP): pyproject.toml moesaic/pyproject.toml constraints.txt
	@echo "setting up $(VENV): a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ./moesaic --editable '.[dev]'
	@touch $(STAMP)

lint: $(STAMP)  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(STAMP)  ## style, types, import rules, fresh stubs, forbidden calls
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	ops/gen_protos.sh --check
	ops/check_forbidden.sh

# Tests that start processes of their own come one at a time; the others share the cores.
ALONE := tests/integration tests/cluster tests/multihost

test: $(STAMP)
	@$(BIN)/pytest -n 2 --dist loadfile $(ALONE:%=--ignore=%); together=$$?; \
	$(BIN)/pytest $(ALONE) && exit $$together

bench: $(STAMP)  ## the standard set; rewrites docs/performance.md. QUICK=1: do the programs work? ONLY=decode,transport
	$(BIN)/python benchmarks/suite.py $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

soak-swaps: $(STAMP)  ## swaps, adds and removes in a row under load; rewrites benchmarks/results/swap_soak.json. N=200
	$(BIN)/python benchmarks/swap_soak.py --changes $(or $(N),1000)

drill: $(STAMP)  ## faults under load, hours of them; rewrites the tables of docs/reliability.md. SEED=7, FAULTS="kill:2 freeze:2"
	ops/drill.sh

fuzz: $(STAMP)  ## spoilt bytes at all that reads bytes; what fails is kept in tests/fuzz/seeds. N=20000, TARGET=bundles, SEED=7
	FUZZ_EXAMPLES=$(or $(N),20000) $(BIN)/pytest tests/fuzz$(if $(TARGET),/test_$(TARGET).py) --verbose --timeout 0 --durations 0 \
		--hypothesis-seed $(or $(SEED),$(shell date +%s))

protos: $(STAMP)  ## regenerate moesaic/v1 from protos/
	ops/gen_protos.sh

demo: $(STAMP)  ## a cluster on the built-in model, one answer, and where its time went
	$(BIN)/moesaic demo

demo-experts: $(STAMP)  ## an expert is added, made better and taken away while the built-in model answers
	$(BIN)/moesaic demo-experts

serve: $(STAMP)  ## the same cluster, staying up
	$(BIN)/moesaic serve --workers 4

demo-model: $(STAMP)  ## train the built-in model again: make demo-model CORPUS=FOLDER
	@test -n "$(CORPUS)" || { echo "usage: make demo-model CORPUS=FOLDER (plain text files, one a domain)" >&2; exit 2; }
	$(BIN)/python ops/demo_model/train.py --corpus "$(CORPUS)" --out cluster/demo_model

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
