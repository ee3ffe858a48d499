# Everything a developer types. The first call of any target installs what it needs into .venv; nothing outside the clone.
PYTHON ?= python3
VENV   := .venv
# How long the campaigns are: make sim SEEDS=…, make chaos KILLS=…, make fuzz SECONDS=…; SEED picks one's first choice.
SEEDS   ?= 1000
KILLS   ?= 100
SECONDS ?= 60
SEED    ?=
PARTICIPANTS ?= 5
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SOURCES := common coordinator participant tests scripts benchmarks docker

SHELL := bash
.PHONY: up down sim mutants-client demo test check fmt fmt-check lint types imports layout protos protos-check vectors-check docs-check mutants lock clean chaos fuzz bench

demo: $(STAMP)          ## the main job: one coordinator, five sites, two of them killed on the way
	$(BIN)/maskwork demo

test: $(STAMP)          ## the whole test suite
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: layout fmt-check lint types imports protos-check vectors-check docs-check mutants-client test  ## what CI runs

# An engine without a bridge network of its own can build on the host's alone.
up: export MASKWORK_BUILD_NETWORK ?= $(shell docker network inspect bridge >/dev/null 2>&1 && echo default || echo host)
up:                     ## a federation in containers: a coordinator and PARTICIPANTS sites; README, "With Docker Compose"
	docker compose up --build --detach --wait --wait-timeout 300 --scale participant=$(PARTICIPANTS)

down:                   ## stop it; identities, models and the sites' records stay on their volumes
	docker compose --profile researcher down

$(STAMP): constraints.txt pyproject.toml common/pyproject.toml coordinator/pyproject.toml participant/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Maskwork needs Python 3.11 or newer; call make with PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt pip hatchling editables
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -c constraints.txt \
		-e common -e coordinator -e 'participant[digits]' --group dev
	touch $@

layout:                 ## a stray __init__.py in a source root hides the other two
	@! ls {common,coordinator,participant}{,/maskwork}/__init__.py 2>/dev/null | grep . \
		|| (echo "remove these files: they hide the other source roots"; exit 1)

fmt: $(STAMP)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

fmt-check: $(STAMP)
	$(BIN)/ruff format --check -q $(SOURCES)

lint: $(STAMP)
	$(BIN)/ruff check -q $(SOURCES)

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

protos: $(STAMP)
	$(BIN)/python scripts/generate_protos.py

protos-check: protos
	$(BIN)/buf lint
	git diff --exit-code -- common/maskwork/wire/v1

vectors-check: $(STAMP)
	for generator in tests/vectors/generate_*.py; do $(BIN)/python -m tests.vectors.$$(basename $$generator .py) --rewrite || exit 1; done
	git diff --exit-code -- tests/vectors

docs-check: $(STAMP)    ## generated pages and diagrams are up to date
	$(BIN)/python scripts/state_diagrams.py
	$(BIN)/python scripts/config_reference.py
	git diff --exit-code -- docs

mutants: $(STAMP)       ## take every check of the protocol out in turn: a test must fail each time
	$(BIN)/python scripts/mutants.py

mutants-client: $(STAMP)
	$(BIN)/python scripts/mutants.py --only client

sim: $(STAMP)           ## simulated federations, one for each seed: every failure that a seed can think of, every invariant checked
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) --out runs/simulation.json

chaos: $(STAMP)         ## real processes, killed, stopped and cut: make chaos [KILLS=100] [SEED=…]
	$(BIN)/python -m tests.chaos --kills $(KILLS) $(if $(SEED),--seed $(SEED))

fuzz: $(STAMP)          ## hostile input to every reader, a coordinator and a participant: SECONDS=60, SEED=1; fails on a crash
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

bench: $(STAMP)         ## what masking costs on this machine: tables, JSON and plots in benchmarks/results; BENCH=--full for full sizes
	$(BIN)/python benchmarks/run.py $(BENCH)

lock: $(STAMP)
	$(BIN)/python scripts/lock.py

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
