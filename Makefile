PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test torture notebooks wheel docs workshop-model clean

# CONSTRAINTS=constraints-oldest.txt: a new .venv with the oldest versions that requirements.txt allows, not the newest
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

# One environment for everything, made once and again only when its inputs change.
.venv/ready: requirements.txt pyproject.toml $(CONSTRAINTS)
	@test -d .venv || { echo "making .venv (once; about two minutes)"; $(PYTHON) -m venv .venv; }
	@$(INSTALL) "$$(grep '^torch' requirements.txt)"
	@$(INSTALL) -e '.[dev]'
	@touch $@

# A real browser for tests/browser, within two minutes. Where none comes, as without a network, the tests are skipped and
# say so, and the next call tries again.
.venv/browser: .venv/ready
	@$(BIN)/python tests/helpers/install_browser.py 120 $(INSTALL) && touch $@ || true

# The quickstart, headless: trains, streams its progress, leaves runs/quickstart/. DATA=my_questions.jsonl for your own.
run: .venv/ready
	@$(BIN)/python notebooks/run.py notebooks/00_quickstart.ipynb runs/quickstart $(if $(DATA),--set 'DATA=$(DATA)')

# notebooks/models/*.ipynb from the template and the presets; badges, install cells, tables and docs/compatibility.md from
# their one source; and the figures that lessons show.
notebooks: .venv/ready
	@$(BIN)/python notebooks/build.py
	@$(BIN)/python -m benchmarks.readme
	@$(BIN)/python -m benchmarks.lessons
	@$(BIN)/python -m benchmarks.compatibility

# One thread a process and two processes: faster than two threads each that wait for each other. The model notebooks run
# as copies in a fresh folder: beside the originals there may be checkpoints of a real run. One of each kind: all of them
# run in tests/notebooks/test_models_run.py, and the lessons in test_exercises.py, with the answers of their exercises.
SMOKED := qwen2.5-1.5b.ipynb qwen3-1.7b.ipynb
test: .venv/ready .venv/browser
	@echo "ruff: lint and format"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "pytest: the unit tests, and mypy over the package (tests/test_typing.py)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests --ignore=tests/browser
	@echo "nbmake: the quickstart and one notebook of each kind of model, in smoke mode, from top to bottom;"
	@echo "a real browser beside it, which the quickstart would leave a core to: JupyterLab and the site"
	@rm -rf runs/smoke && mkdir -p runs/smoke && cd notebooks/models && cp $(SMOKED) ../../runs/smoke
	@NBHELPERS_SMOKE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rs \
		--nbmake --nbmake-timeout=300 notebooks/00*.ipynb tests/browser runs/smoke

# Kills, signals, full disks, twins, flipped bits: the table in docs/reliability.md. An hour; as root it fills small disks too.
torture: .venv/ready
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/helpers/torture.py --write

# The site, into site/: what it is made of is in docs/pages.py.
.venv/docs: .venv/ready
	@$(INSTALL) -e '.[docs]' && touch $@

docs: .venv/docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

# The sdist and the wheel, looked into and tried; publishing is .github/workflows/release.yml, on a tag.
wheel: .venv/ready
	@$(BIN)/python tests/helpers/wheel.py $(TAG)

# Trains the workshop model from nothing: 7 minutes on an H200, hours on a laptop.
workshop-model: .venv/ready
	@$(BIN)/python -m nbhelpers.workshop.recipe --out nbhelpers/workshop

clean:
	rm -rf .venv runs dist site
