# `make` lists the targets. Every target that needs Python makes .venv first, once.

.DEFAULT_GOAL := help
.PHONY: help install run test test-slow lint chaos serve-check slurm-check screens bench aot figures clean distclean

# Images of containers often set it: each process would compile every source, and each run of the
# tests every assertion.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv/bin/python
STAMP := .venv/.installed

# The interpreter for .venv: the first that runs and is of a version we support.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	>/dev/null 2>&1 && echo $$python && exit; done; echo python3)
# Where torch comes from; on a laptop: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Further words for the command: make run ARGS='layout=single', make test ARGS='-k layout'
ARGS ?=
# In the order of folders: by the number of tests, long files of few tests would come last, and one
# worker would wait for the others. Three for two cores: a worker often waits for its ranks to start.
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder
# More threads than cores wait for each other; ranks and benchmarks choose theirs themselves.
test test-slow: export OMP_NUM_THREADS := 1
# Where `make run` finds what it trained.
RUN_FOLDER := runs/$(or $(patsubst name=%,%,$(filter name=%,$(ARGS))),demo)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  ARGS='...' adds to run, test, bench, figures; TORCH_INDEX=<url> says where torch comes from"

install: $(STAMP) ## make .venv and install what constraints.txt pins

run: $(STAMP) ## train a small model on two local CPU ranks, the defaults of conf/pretrain.yaml
	$(VENV) launch/prepare.py
	$(VENV) launch/pretrain.py when_finished=start_again $(ARGS)
	@echo; echo "a sample:"
	@$(VENV) launch/generate.py checkpoint=$(RUN_FOLDER) prompt='"def main("' max_new_tokens=80
	@echo; echo "the run as a page, for a browser: $(RUN_FOLDER)/dashboard.html"

test: $(STAMP) ## run the tests, on three workers (ARGS='-n 0': in one process, for a debugger)
	$(VENV) -m pytest tests -m "not slow" $(WORKERS) --durations 25 $(ARGS)

test-slow: $(STAMP) ## run the tests that take longer: more layouts of four ranks, larger worlds
	$(VENV) -m pytest tests -m slow $(WORKERS) $(ARGS)

lint: $(STAMP) ## ruff, pyright, and no file above 500 kB
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m pyright
	@large=$$(git ls-files -z --cached --others --exclude-standard \
		| xargs -0 sh -c 'find "$$@" -type f -size +500000c 2>/dev/null' find); \
	test -z "$$large" || { echo "larger than 500 kB: $$large"; exit 1; }

chaos: $(STAMP) ## kill, starve and damage runs at random and compare each with itself (about an hour)
	$(VENV) tests/chaos/soak.py $(or $(ARGS),faults=200 seed=1)
	$(VENV) tests/chaos/stop_trials.py --trials 30
	$(VENV) tests/chaos/goodput.py

serve-check: $(STAMP) ## compare a real vLLM with transformers on an exported model (3.5 GB, 7 minutes)
	$(VENV) tests/serve/serve_check.py $(ARGS)

slurm-check: $(STAMP) ## run chains of jobs on a SLURM of their own (installs it as root; 8 minutes)
	$(VENV) tests/slurm/slurm_check.py $(ARGS)

screens: $(STAMP) ## look at the pages of a small run and of two plans in Chromium (installs it as root; 3 minutes)
	$(VENV) tests/screens/screens.py $(ARGS)

bench: $(STAMP) ## run each benchmark of tests/bench in turn, one table each; 2: it needs a GPU
	@for file in tests/bench/bench_*.py; do echo "$$file"; $(VENV) $$file $(ARGS) \
		|| test $$? -eq 2 || exit 1; done

aot: $(STAMP) ## compile every Triton kernel for H100 and H200, no GPU needed (3 minutes); 1 if one spills
	$(VENV) tests/aot/aot.py --json docs/figures/aot.json $(ARGS)
	$(VENV) docs/figures.py

figures: $(STAMP) ## draw the figures of the documentation again
	$(VENV) docs/figures.py $(ARGS)

clean: ## remove caches; runs/ and .venv stay
	find . -name .venv -prune -o -name .git -prune -o -name __pycache__ -type d -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache *.egg-info

distclean: clean ## remove caches and environments
	rm -rf .venv .venv-serve

# The stamp comes last, so an interrupted installation is taken up again. torch comes first and
# alone, because it may come from another index than the rest. Oracles are files to read, in a
# folder that Python does not look through (docs/decisions/0032).
$(STAMP): setup.py constraints.txt tests/oracles.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 12) or sys.exit( \
		"$(PYTHON) is Python %d.%d; needed: 3.11 or 3.12 (make PYTHON=/path/to/python3.11)" % v)'
	@echo "installing into .venv with $(PYTHON): about one minute, more where torch must be downloaded"
	@rm -f $@
	@$(VENV) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(VENV) -m pip install -qq --disable-pip-version-check --no-input \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	@$(VENV) -m pip install -qq --disable-pip-version-check --no-input \
		-c constraints.txt -e '.[data,dev]'
	@rm -rf .venv/oracles
	@$(VENV) -m pip install -qq --disable-pip-version-check --no-input \
		--no-deps --target .venv/oracles -r tests/oracles.txt
	@touch $@
	@echo "installed"
