# What README and .ci/run call. The first call builds .venv; nothing else has to be installed by hand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := mobilevd_deploy benchmarks tests

.PHONY: demo test check fix clean

demo: $(READY)  ## export the bundled checkpoint and make a clip from a picture
	$(BIN)/mobilevd-deploy export --output build/demo/artifact
	$(BIN)/mobilevd-deploy generate models/demo.png --artifact build/demo/artifact --scale 3 \
	  --output build/demo/clip.gif --sheet build/demo/sheet.png

test: check  ## everything that CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: $(READY)  ## report style and type errors
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

fix: $(READY)  ## mend what can be mended by itself
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## remove what the demo made; .venv stays
	rm -rf build

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
