# Everything from here: `make help` lists it. Needs Python 3.10 to 3.13, make, and a package index.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

## Data set: phantom, brats, abdomen, cardiac or folder (experiments/data/<DATASET>.yaml)
DATASET ?= phantom
## Name of the run; its files lie under RUNS/DATASET/EXPERIMENT
EXPERIMENT ?= default
## Network that is adapted (experiments/backbone/<BACKBONE>.yaml)
BACKBONE ?= pocket
## Folder of the scans, in the layout in which they are downloaded; empty: the data set's own default
DATA_DIR ?=
## Not empty: show the libraries' notices and model summaries, too
V ?=
## More options for the command behind a target, e.g. ARGS="--model.sce.sub_classes.number 4"
ARGS ?=
## How stages run: cpu, gpu, ddp, fsdp, slurm or debug (experiments/trainer/<TRAINER>.yaml); empty: as the stages say
TRAINER ?=
## What figures are sent to: wandb, lineage (with artifacts), csv or tensorboard (experiments/logger/<LOGGER>.yaml); empty: wandb
LOGGER ?=
## Rounds of pseudo-labels and segmentation network: from the second on PAM starts from what the network predicts
ROUNDS ?= 1
## What starts the processes of a stage, e.g. ".venv/bin/torchrun --nproc-per-node 8" or "srun .venv/bin/python"
LAUNCHER ?=
## Sweep: sce, pam, classify or segment (experiments/sweeps/<SWEEP>.yaml)
SWEEP ?= sce
## Not empty: the sweep runs here, without an account
LOCAL ?=
## Runs of a sweep, those of earlier calls included
COUNT ?= 20
## Study: several data sets, variants and seeds (experiments/study/<STUDY>.yaml)
STUDY ?= sets
## Seeds of the study that are run now, e.g. "0 1"; empty: all that its file names
SEEDS ?=
## Name of the folder of a sweep, RUNS/DATASET/sweeps/NAME, or of a study, RUNS/studies/NAME; empty: SWEEP or STUDY
NAME ?=
## Runs that `make report` puts on one page, e.g. "phantom/default phantom/k4"; empty: the report of one run
COMPARE ?=
## Scans that `make predict` segments: a folder of scans of any format, or one file
SCANS ?=
## Folder of their segmentations; empty: segmentations/<name of SCANS> in the run's folder
OUT ?=
## Not empty: without PAM refinement
PLAIN ?=
## Not empty: `make predict` writes the scores behind the segmentations, too
SCORES ?=
## Which DICOM series `predict` segments, "MR flair*"; default: as the training scans
SERIES ?=
## Folder of all runs
RUNS ?= runs
## Interpreter that .venv is made from, 3.10 to 3.13
PYTHON ?= python3

UV := uv==0.13.9
BIN := .venv/bin
STAMP := .venv/.installed
CACHES := .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist docs/_build *.egg-info .constraints.tmp
SOURCES := src data_modules benchmarks tests

# A text as one word of the shell, whatever is in it; a variable's value so, as it was given: make does not expand it.
# ARGS alone is a list of words, as the shell reads them.
quote = '$(subst ','\'',$(1))'
given = $(call quote,$(value $(1)))
option = $(if $(strip $(value $(2))),$(1) $(call given,$(2)))
each = $(foreach name,$(value $(1)),$(call quote,$(name)))
more = $(if $(strip $(ARGS)),-- $(ARGS))

pipeline = $(BIN)/python -m weakmedsam $(1) $(if $(strip $(V)),-v) --dataset $(call given,DATASET) \
	--experiment $(call given,EXPERIMENT) --backbone $(call given,BACKBONE) --runs $(call given,RUNS) \
	$(call option,--data-dir,DATA_DIR) $(call option,--trainer,TRAINER) $(call option,--logger,LOGGER) \
	$(call option,--launcher,LAUNCHER) --rounds $(call given,ROUNDS) $(more)

.PHONY: help setup init check sweep study docs train prepare classify pseudo-labels review segment evaluate upper-bound report status \
	predict test lint types format bench costs weights pocket constraints clean clean-runs distclean

## This list
help:
	@awk 'function show(name) { printf "  %-14s %s\n", name, doc; doc = "" } \
		/^## / { doc = substr($$0, 4); next } \
		doc && /^[A-Z_]+ \?=/ { name = $$1; value = $$0; sub(/^[^=]*= */, "", value); \
			vars = vars sprintf("  %-14s %s%s\n", name, doc, value == "" ? "" : " [" value "]"); doc = ""; next } \
		doc && /^[a-z-]+:/ { sub(/:.*/, "", $$1); show($$1); next } \
		{ doc = "" } \
		BEGIN { print "usage: make TARGET [VARIABLE=value ...]\n\ntargets:" } \
		END { printf "\nvariables [default]:\n%s", vars }' $(firstword $(MAKEFILE_LIST))

## Make .venv from pyproject.toml and constraints.txt; does nothing where it is up to date
setup: $(STAMP)

# The stamp comes last, so that a setup that was killed is begun anew; a finished one is updated in place.
# Compiled at once, as pip does: where Python may not write bytecode later, every start would take three times as long.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "$(PYTHON) is not a Python 3.10 to 3.13; name one: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; \
		exit 1; }
	@test -e $@ || $(PYTHON) -m venv --clear .venv || { \
		echo "$(PYTHON) cannot make .venv (Debian and Ubuntu: install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(UV)'
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

## Look at the scans in DATA_DIR and write a commented YAML for them, experiments/data/<name of the folder>.yaml
init: $(STAMP)
	@test -n $(call quote,$(strip $(value DATA_DIR))) || { \
		echo "init needs DATA_DIR, a folder of scans: make init DATA_DIR=/scans" >&2; exit 1; }
	@$(BIN)/python -m weakmedsam init $(call given,DATA_DIR) $(ARGS)

## Look at a data set before training: faults, duplicates, splits, outliers, a page with pictures; status 1: mend something
check: $(STAMP)
	@$(BIN)/python -m weakmedsam check --dataset $(call given,DATASET) --runs $(call given,RUNS) \
		$(call option,--data-dir,DATA_DIR) $(more)

## All stages of a run: prepare, classify, pseudo-labels, segment, evaluate, report; continues where it stopped
train: $(STAMP)
	@$(call pipeline,train)

## Turn the scans into a slice store (with the phantom: draw them first)
prepare: $(STAMP)
	@$(call pipeline,prepare)

## Train the classification network, with sub-class exploration
classify: $(STAMP)
	@$(call pipeline,classify)

## Make pseudo-labels, with prompt affinity mining
pseudo-labels: $(STAMP)
	@$(call pipeline,pseudo-labels)

## See and correct the pseudo-labels of the run DATASET/EXPERIMENT in the browser (docs/correcting.md)
review: $(STAMP)
	@$(BIN)/python -m weakmedsam review --dataset $(call given,DATASET) --experiment $(call given,EXPERIMENT) \
		--runs $(call given,RUNS) $(ARGS)

## Train the segmentation network on the pseudo-labels
segment: $(STAMP)
	@$(call pipeline,segment)

## Score the segmentation network, and what PAM makes of its predictions, against the expert masks of the test cases
evaluate: $(STAMP)
	@$(call pipeline,evaluate)

## Train and score the same network on EXPERT MASKS: what weak labels could reach at best
upper-bound: $(STAMP)
	@$(call pipeline,upper-bound)

# RUNS is the folder of all runs; several names there, and no folder of that name, are runs to compare all the same.
## Write the run's report.html; with COMPARE="a/b c/d" (or RUNS="a/b c/d") one page about several runs
report: $(STAMP)
	@$(if $(strip $(value COMPARE)),$(BIN)/python -m weakmedsam compare $(call each,COMPARE) --runs $(call given,RUNS),\
	$(if $(word 2,$(value RUNS)),if test -d $(call given,RUNS); then $(call pipeline,report); else \
	$(BIN)/python -m weakmedsam compare $(call each,RUNS) --runs runs; fi,$(call pipeline,report)))

## Show which stages of the run DATASET/EXPERIMENT are done and which are not, and why
status: $(STAMP)
	@$(BIN)/python -m weakmedsam status --dataset $(call given,DATASET) --experiment $(call given,EXPERIMENT) \
		--runs $(call given,RUNS)

## Segment unlabelled SCANS with a trained run's network, in their own space (docs/prediction.md)
predict: $(STAMP)
	@test -n $(call quote,$(strip $(value SCANS))) || { \
		echo "predict needs SCANS, a folder of scans: make predict SCANS=/new/scans" >&2; exit 1; }
	@$(BIN)/python -m weakmedsam predict $(if $(strip $(V)),-v) --scans $(call given,SCANS) $(call option,--out,OUT) $(if $(PLAIN),--plain) $(if $(SCORES),--scores) $(call option,--series,SERIES) \
		--dataset $(call given,DATASET) --experiment $(call given,EXPERIMENT) --runs $(call given,RUNS) $(more)

## Sweep over settings on W&B, or here with LOCAL=1 (docs/sweeps.md)
sweep: $(STAMP)
	@$(BIN)/python -m weakmedsam sweep $(call given,SWEEP) --dataset $(call given,DATASET) \
		--experiment $(call given,EXPERIMENT) --backbone $(call given,BACKBONE) --runs $(call given,RUNS) \
		--count $(call given,COUNT) $(if $(LOCAL),--local) $(call option,--name,NAME) \
		$(call option,--data-dir,DATA_DIR) $(call option,--trainer,TRAINER) $(more)

## Run data sets, variants and seeds, and write one page about them; continues where it stopped (docs/sweeps.md)
study: $(STAMP)
	@$(BIN)/python -m weakmedsam study $(call given,STUDY) $(if $(strip $(V)),-v) --backbone $(call given,BACKBONE) \
		--runs $(call given,RUNS) --rounds $(call given,ROUNDS) $(call option,--name,NAME) $(call option,--data-dir,DATA_DIR) \
		$(if $(strip $(value SEEDS)),--seeds $(call each,SEEDS)) $(call option,--trainer,TRAINER) \
		$(call option,--logger,LOGGER) $(call option,--launcher,LAUNCHER) $(more)

# One thread a worker: two workers with all threads each are slower than one.
## Run the test suite (ARGS go to pytest)
test: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

## Check style, docstrings, annotations, format and who imports whom
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

## Check types
types: $(STAMP)
	$(BIN)/mypy

## Mend format and what else can be mended
format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## Run every benchmark (ARGS=--full for more)
bench: $(STAMP)
	@for name in $(filter-out costs,$(sort $(basename $(notdir $(wildcard benchmarks/[a-z]*.py))))); do \
		echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(ARGS) || exit 1; done

## Write docs/configuration.md from the code and build the documentation site, docs/_build/html; warnings are errors
docs: $(STAMP)
	@$(BIN)/python -m weakmedsam.settings_reference
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -d docs/_build/doctrees docs docs/_build/html

## Find or fetch the official weights of BACKBONE, verified; training does so by itself (docs/weights.md)
weights: $(STAMP)
	@$(BIN)/python -m weakmedsam weights $(call given,BACKBONE) $(ARGS)

## Measure what every backbone costs and write docs/costs.md (ARGS=--full for ViT-L and ViT-H)
costs: $(STAMP)
	$(BIN)/python -m benchmarks.costs $(ARGS)

## Pre-train the embedded backbone on procedural images (5,000 steps, about two hours on 2 cores)
pocket: $(STAMP)
	$(BIN)/python -m weakmedsam.pretraining $(ARGS)

# The header says what the file is; the pins below it name no address, so that any index serves.
## Refresh constraints.txt to the newest versions that pyproject.toml allows
constraints: $(STAMP)
	@sed '/^#/!d' constraints.txt > .constraints.tmp
	@$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --universal --python-version 3.10 --upgrade \
		--python $(BIN)/python --no-annotate --no-header --no-emit-index-url --no-emit-find-links >> .constraints.tmp
	@mv .constraints.tmp constraints.txt

## Remove caches and build output
clean:
	rm -rf $(CACHES)
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

## Remove the files of the run DATASET/EXPERIMENT
clean-runs:
	@for name in $(foreach name,RUNS DATASET EXPERIMENT,$(call quote,$(strip $(value $(name))))); do \
		test -n "$$name" || { echo "clean-runs needs RUNS, DATASET and EXPERIMENT" >&2; exit 1; }; done
	@for name in $(call given,DATASET) $(call given,EXPERIMENT); do case "/$$name/" in */./*|*/../*|*//*) \
		echo "clean-runs removes one run: $$name is no name of one" >&2; exit 1;; esac; done
	rm -rf -- $(call given,RUNS)/$(call given,DATASET)/$(call given,EXPERIMENT)

## Remove .venv too
distclean: clean
	rm -rf .venv
