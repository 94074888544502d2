# From a fresh clone, `make demo` and `make test` do all the set-up by themselves; scripts/setup_env.py is what does it.

# vLLM has one build for NVIDIA GPUs and one for CPUs
ifndef EXTRA
EXTRA := $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU '),gpu,cpu)
endif
CONFIG ?= configs/dsrl.yaml
# a process a core pays up to two, and each has an engine, of which a GPU holds one
JOBS ?= $(if $(filter gpu,$(EXTRA)),0,2)

# shows the command as one would type it with .venv active
in_venv = @echo '$(subst ','\'',$(strip $(1)))'; PATH="$(CURDIR)/.venv/bin:$$PATH" $(1)

.PHONY: help setup demo test check docs soak FORCE

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'
	@echo
	@echo 'EXTRA=cpu or gpu (here: $(EXTRA)); PYTHON=the Python 3.11 or 3.12 to use; ARGS=more arguments of demo or test; JOBS=processes of test'

setup: .venv/.ready-$(EXTRA) ## .venv with everything in it

demo: setup ## train a tiny model on this machine (CONFIG=another file)
	$(call in_venv,prerl fit --config $(CONFIG) $(ARGS))

test: setup ## the tests
	$(call in_venv,pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS))

soak: setup ## half an hour: 50 kills, and 2,000 steps without a leak; figures into benchmarks/results/soak.json
	$(call in_venv,python tests/faults/soak.py kills)
	$(call in_venv,python tests/faults/soak.py steps)

check: setup ## ruff and mypy
	$(call in_venv,ruff check)
	$(call in_venv,ruff format --check)
	$(call in_venv,mypy)

docs: setup ## the documentation, into docs/_build/html
	$(call in_venv,python -m sphinx -W --keep-going -q -b html docs docs/_build/html)

# a PYTHON that is named may differ from the one in .venv: then the script looks, whatever the stamp says
.venv/.ready-$(EXTRA): pyproject.toml $(if $(PYTHON),FORCE)
	@for python in python3 python3.12 python3.11 python; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then \
	    exec $$python scripts/setup_env.py --extra $(EXTRA) $(if $(PYTHON),--python '$(PYTHON)'); \
	  fi; \
	done; echo 'Python 3.11 or 3.12 is needed, and there is no Python 3 here' >&2; exit 1
