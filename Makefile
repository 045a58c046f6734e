# What a user types; see README.md. `make train` and `make test` set everything up on first use.
CFG   ?= configs/quickstart.yaml
ARGS  ?=
PY    ?= .venv/bin/python
JOBS  ?= 2
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# With the user's own interpreter (PY=python3) nothing is installed.
ifeq ($(PY),.venv/bin/python)
READY := .venv/.ready
endif

.PHONY: help setup train test test-slow compare compare-speed lint report gpu-check bench dist docs prep-cifar100 prep-imagenet prep-imagenet100 clean
.DEFAULT_GOAL := help

help:
	@echo "make train [CFG=configs/quickstart.yaml] [ARGS='--epochs 1']"
	@echo "                                        set up on first use, then train"
	@echo "make setup [YES=1]                      .venv with everything; asks before sudo,"
	@echo "                                        unless YES=1 agrees"
	@echo "make test                               the test suite, all but its slow half"
	@echo "make test-slow                          the slow half: many mutated files, kills"
	@echo "make compare A=main B=.                 losses, spectra, scores of two commits"
	@echo "                                        or folders, bit for bit on the CPU"
	@echo "make compare-speed A=main B=.           how fast both are, pair by pair, with"
	@echo "                                        an interval (WHAT=loader: one bench)"
	@echo "make lint                               ruff and pyright"
	@echo "make report [RUN=output/latest]         a run as report.html and pictures"
	@echo "make prep-cifar100 [SRC=archive] OUT=dir    downloads it without SRC"
	@echo "make prep-imagenet SRC=dir OUT=dir      SRC holds train/ and val/"
	@echo "make prep-imagenet100 SRC=dir OUT=dir   100 classes of the same"
	@echo "make bench [WHAT=...]                   measured beside peers: prep, loader,"
	@echo "                                        augment, spectral, step, end-to-end,"
	@echo "                                        limits, growth; all without WHAT"
	@echo "make gpu-check [PY=python3] [JOBS=16]   GPU tests and benches in 6 minutes, a"
	@echo "                                        page in docs/benchmarks/; ARGS='--tiny'"
	@echo "                                        rehearses it without a GPU"
	@echo "make dist                               wheel and sdist, built and checked"
	@echo "make docs                               the documents as a site, in site/"
	@echo "make clean                              remove .venv, built packages and site"

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt scripts/system_libraries.sh
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; give its path with PYTHON=..."; exit 1; }
	@sh scripts/system_libraries.sh "$(PYTHON)"
	@test -x .venv/bin/python || "$(PYTHON)" -m venv .venv
	@echo "installing Python packages into .venv (6 GB on disk; minutes on a fast network)"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(READY)
	$(PY) -m lowrank_vit.train --config $(CFG) $(ARGS)

# pytest takes the last -m, so ARGS="-m gpu" replaces these. A test that passes at the second try is listed as RERUN
# with the first failure: the test is at fault and has to be mended, not the change.
test: $(READY)
	$(PY) -m pytest -n $(JOBS) --dist worksteal --reruns 1 --rerun-show-tracebacks -m "not slow" $(ARGS)

test-slow: $(READY)
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m slow $(ARGS)

compare: $(READY)
	@test -n "$(A)" -a -n "$(B)" || { echo "Say which commits or folders: make compare A=main B=."; exit 2; }
	$(PY) -m tests.golden.compare "$(A)" "$(B)" $(ARGS)

compare-speed: $(READY)
	@test -n "$(A)" -a -n "$(B)" || { echo "Say which commits or folders: make compare-speed A=main B=."; exit 2; }
	$(PY) -m tests.golden.compare_speed "$(A)" "$(B)" $(if $(WHAT),--only $(WHAT)) $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

report: $(READY)
	$(PY) -m lowrank_vit.report $(or $(RUN),output/latest)

gpu-check: $(READY)
	$(PY) -m benchmarks gpu-check $(if $(filter file default undefined,$(origin JOBS)),,--jobs $(JOBS)) $(ARGS)

# ARGS adds options of `python -m data_prep`, for example ARGS="--max-side 400 --on-bad skip"; size and quality apply
# only to train/, since validation sets keep their pixels unless ARGS has --lossy-val.
prep-cifar100: $(READY)
	@test -n "$(OUT)" || { echo "Say where to write: make prep-cifar100 OUT=data/cifar100 [SRC=archive]"; exit 2; }
	$(PY) -m data_prep cifar100 --out "$(OUT)" $(if $(SRC),--src "$(SRC)",--download) $(ARGS)

prep-imagenet: $(READY)
	@test -n "$(SRC)" -a -n "$(OUT)" || { echo "Say from where to where: make prep-imagenet SRC=dir OUT=dir"; exit 2; }
	$(PY) -m data_prep imagefolder --src "$(SRC)" --out "$(OUT)" $(ARGS)

prep-imagenet100: $(READY)
	@test -n "$(SRC)" -a -n "$(OUT)" || { echo "Say from where to where: make prep-imagenet100 SRC=dir OUT=dir"; exit 2; }
	$(PY) -m data_prep imagefolder --src "$(SRC)" --out "$(OUT)" --classes configs/imagenet100_classes.txt $(ARGS)

bench: $(READY)
	$(PY) -m benchmarks $(or $(WHAT),all --short) $(ARGS)

# The release: a wheel and an sdist in dist/, see docs/releasing.md.
dist: $(READY)
	rm -rf dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*

# Laid out as in the repository, so that each link between two files holds on the site, too.
docs: $(READY)
	rm -rf build/docs site
	mkdir -p build/docs
	cp -rL README.md CONTRIBUTING.md CHANGELOG.md LICENSE docs examples build/docs/
	$(PY) -m zensical build --strict

clean:
	rm -rf .venv build dist site .cache *.egg-info
