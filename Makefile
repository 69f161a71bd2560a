# make demo    set up, classify real images with the packaged weights
# make test    set up, check and test (ends with pytest's closing line)
# The rest is for developers. PYTHON is the interpreter to use (3.10 or newer), VENV the environment to make.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
OLDEST = $(VENV)-oldest

.PHONY: demo test lint javascript timm-suite test-slow test-oldest clean

demo: $(VENV)/installed
	$(BIN)/python tests/demo.py

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the tests of onnx/ and hub/space/ in JavaScript need (Node.js); they are skipped without it, or without chromium
javascript: tests/javascript/node_modules/.package-lock.json

tests/javascript/node_modules/.package-lock.json: tests/javascript/package-lock.json
	cd tests/javascript && npm ci --ignore-scripts --no-fund --no-audit

# What the default run leaves out for time
test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 -m slow

# timm's own tests/test_models.py on all our models
timm-suite: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 -m '' tests/test_timm.py

# With the oldest versions that are allowed, all together, without a slow compiler (Python 3.10 to 3.13, as of torch 2.6)
test-oldest:
	PIP_CONSTRAINT=$(CURDIR)/.ci/oldest.txt $(MAKE) VENV=$(OLDEST) $(OLDEST)/installed-test
	$(OLDEST)/bin/python -m pytest -n 2 -k 'not inductor'

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	echo '*' > $(VENV)/.gitignore

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(PIP) install -e .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml
	$(PIP) install -e '.[test]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) $(OLDEST) tests/javascript/node_modules output .pytest_cache .mypy_cache .ruff_cache
