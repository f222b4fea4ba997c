PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test notebooks workshop-model clean

# One environment for everything, made once and again only when its inputs change.
.venv/ready: requirements.txt pyproject.toml
	@test -d .venv || { echo "making .venv (once; about two minutes)"; $(PYTHON) -m venv .venv; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch' requirements.txt)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

