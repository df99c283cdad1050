# The commands that people type. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help install plan study mlflow report up down test chaos browser lint docs format bench

# Values from the command line are passed on as text, in the environment: neither make nor a shell interprets anything in them.
GIVEN := SET PROFILE TARGETS WORKERS TESTS BENCH MINUTES SEED CHROMIUM PREFECT_PORT MLFLOW_PORT ENGINE RAY_ADDRESS
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
export $(GIVEN)
VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALLED := $(VENV)/installed
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv from requirements.lock and install the project in it

$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "installing the packages of requirements.lock into $(VENV): this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install -qq --disable-pip-version-check --no-compile --requirement requirements.lock
	@$(RUN) compileall -qq -j 0 $(VENV)/lib || true # on all cores, unlike pip; some packages hold files that are no valid Python
	$(RUN) pip install -qq --disable-pip-version-check --no-deps --editable .
	@touch $@

plan: $(INSTALLED) ## Show what the study would run, and about how long it would take [SET=...] [PROFILE=gpu] [WORKERS=2]
	@DIT_SET="$$SET" DIT_PROFILE="$$PROFILE" DIT_WORKERS="$$WORKERS" $(RUN) pipelines plan

study: $(INSTALLED) ## Run all stages that are not up to date [SET="train.steps=300 study.seeds=[0]"] [PROFILE=gpu] [TARGETS=train] [WORKERS=2] [ENGINE=ray] [RAY_ADDRESS=...]
	@DIT_SET="$$SET" DIT_PROFILE="$$PROFILE" DIT_WORKERS="$$WORKERS" DIT_TARGETS="$$TARGETS" DIT_ENGINE="$$ENGINE" $(RUN) pipelines study

mlflow: $(INSTALLED) ## Add runs that are missing in MLflow [MLFLOW_TRACKING_URI=...]
	@$(RUN) pipelines mlflow

report: $(INSTALLED) ## Open the report in a browser
	@test -f reports/index.html || { echo "error: reports/index.html not found; run 'make study' first" \
		"(reports of experiments are in .scratch/experiments/NAME/reports)" >&2; exit 2; }
	@$(RUN) webbrowser -t "file://$$PWD/reports/index.html"

up: $(INSTALLED) ## Start a Prefect server, a worker and the MLflow UI on 127.0.0.1 [PREFECT_PORT=4200] [MLFLOW_PORT=5000]
	@$(RUN) pipelines up

down: $(INSTALLED) ## Stop what `make up` started
	@$(RUN) pipelines down

test: $(INSTALLED) browser ## Run the tests [TESTS=tests/test_model.py] [TESTS='-m slow'] [CHROMIUM=/path/to/chrome]
	$(RUN) pytest -n 3 --dist loadfile --no-loadscope-reorder $$TESTS

chaos: $(INSTALLED) ## Kill and damage small studies at random, and compare their results with an undisturbed one [MINUTES=30] [SEED=0]
	@$(VENV)/bin/python tests/chaos --minutes "$${MINUTES:-30}" $${SEED:+--seed "$$SEED"}

browser: # The report's page test opens it in Chromium or Chrome.
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v "$$name" >/dev/null && exit 0; done; \
	command -v apt-get >/dev/null || { echo "error: the tests need Chromium or Chrome: install one, or make test CHROMIUM=/path/to/chrome" >&2; exit 2; }; \
	root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	$$root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$root apt-get install -y -qq --no-install-recommends chromium >/dev/null

bench: $(INSTALLED) ## Measure the speed of this machine; results go to .scratch/bench [BENCH="train sharing sample encode autoencoder features diagnostics stages lock study"]
	@for name in $${BENCH:-train sharing sample encode autoencoder features diagnostics stages lock study}; do \
		$(VENV)/bin/python benchmarks/$$name.py --output .scratch/bench/$$name.json || exit; done

docs: $(INSTALLED) ## Build the documentation as a site, in .scratch/site
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "to read it: $(VENV)/bin/python -m http.server --bind 127.0.0.1 --directory .scratch/site 8000"

lint: $(INSTALLED) docs ## Check style, types, spelling, imports between packages, and the links of the documentation
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python docs/spelling.py

format: $(INSTALLED) ## Format the code
	$(RUN) ruff check --fix-only --quiet .
	$(RUN) ruff format --quiet .
