# `make demo` and `make test` set up everything they need in .venv; PYTHON= names another interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The stamp carries the interpreter's version, so another PYTHON makes a new environment.
STAMP  := $(VENV)/.installed-$(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')

.PHONY: setup demo test config notebooks readme clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(if $(wildcard $(STAMP)),,$(PYTHON) -m venv --clear $(VENV))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(STAMP)           ## explain the mistakes of a real ImageNet model on real photos: demo/*.png
	$(BIN)/python -m fastai_cam.demo demo

test: $(STAMP)           ## every test, and every notebook as a test
	$(BIN)/python -m pytest tests

config: $(STAMP)         ## settings.ini -> pyproject.toml
	$(BIN)/nbdev-migrate-config

notebooks: $(STAMP)      ## run every notebook from the top, keep its outputs
	$(BIN)/python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=900 nbs/*.ipynb
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

readme: $(STAMP)         ## nbs/index.ipynb -> README.md, with the outputs it holds
	$(BIN)/python tests/readme.py

clean:
	rm -rf $(VENV) demo build dist *.egg-info
