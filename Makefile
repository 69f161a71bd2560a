# make demo    set up, classify real images with the packaged weights
# make test    set up, check and test (ends with pytest's closing line)
# The rest is for developers. PYTHON is the interpreter to use (3.10 or newer), VENV the environment to make.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
OLDEST_TIMM = 1.0.28
OLDEST_TORCH = torch==2.10.0 torchvision==0.25.0

.PHONY: demo test lint timm-suite test-slow test-oldest test-oldest-timm test-oldest-torch clean

demo: $(VENV)/installed
	$(BIN)/python tests/demo.py

test: lint
	$(BIN)/python tests/timm_suite.py sharesnet34 sharesnet50 sharesnet164_cifar shawrn40_4
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the default run leaves out for time
test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

# timm's own tests/test_models.py on all our models
timm-suite: $(VENV)/installed-test
	$(BIN)/python tests/timm_suite.py

test-oldest: test-oldest-timm test-oldest-torch

test-oldest-timm: $(VENV)/installed-test
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/oldest-timm timm==$(OLDEST_TIMM)
	PYTHONPATH=$(VENV)/oldest-timm $(BIN)/python -c "import timm; assert timm.__version__ == '$(OLDEST_TIMM)'"
	PYTHONPATH=$(VENV)/oldest-timm $(BIN)/python -m pytest

test-oldest-torch:
	PIP_CONSTRAINT= $(MAKE) VENV=$(VENV)-oldest SETUP='timm==$(OLDEST_TIMM) $(OLDEST_TORCH)' $(VENV)-oldest/installed-test
	$(VENV)-oldest/bin/python -m pytest

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	echo '*' > $(VENV)/.gitignore

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(PIP) install -e . $(SETUP)
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml
	$(PIP) install -e '.[test]' $(SETUP)
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) $(VENV)-oldest output .pytest_cache .mypy_cache .ruff_cache
