# What README and .ci/run call. The first call builds .venv; nothing else has to be installed by hand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := mobilevd_deploy benchmarks tests android_app docs

.PHONY: demo float artifacts apk test test-fast check docs fix clean

demo: artifacts  ## a clip by the exported float model, then one by the NPU's binaries on its simulator
	@$(MAKE) --no-print-directory build/demo/clip.gif
ifeq ($(shell uname -sm),Linux x86_64)
	@$(MAKE) --no-print-directory build/demo/npu-clip.gif
else
	@echo "Qualcomm's compiler and simulator are for Linux on x86-64, so the demo ends here"
endif

float: $(READY)  ## the demo's float artifact
	$(BIN)/mobilevd-deploy export --recipe onnx --output build/demo/artifact

artifacts: float  ## and where the compiler runs, the one with the NPU's binaries
ifeq ($(shell uname -sm),Linux x86_64)
	$(BIN)/mobilevd-deploy export --recipe xiaomi-14-pro --output build/demo/npu
endif

build/demo/clip.gif: build/demo/artifact/manifest.sha256 models/demo.png
	$(BIN)/mobilevd-deploy generate models/demo.png --artifact build/demo/artifact --scale 3 \
	  --output $@ --sheet build/demo/sheet.png

build/demo/npu-clip.gif: build/demo/npu/manifest.sha256 models/demo.png
	$(BIN)/mobilevd-deploy generate models/demo.png --artifact build/demo/npu --provider npu-sim --scale 3 \
	  --output $@ --sheet build/demo/npu-sheet.png

SIGN := $(if $(KEYSTORE),--keystore '$(KEYSTORE)' --key-alias '$(or $(KEY_ALIAS),release)')

apk: artifacts  ## the Android app in both flavours, into build/apk; KEYSTORE and QNN_LIBS: docs/how-to/app.md
	$(PYTHON) android_app/build.py apk --artifact demo=build/demo/artifact $(SIGN)
ifeq ($(shell uname -sm),Linux x86_64)
	$(PYTHON) android_app/build.py apk --flavour npu --artifact demo=build/demo/npu $(SIGN) \
	  $(if $(QNN_LIBS),--qnn-libs '$(QNN_LIBS)')
endif

test: check float  ## everything that CI runs
	MOBILEVD_ARTIFACT=$(CURDIR)/build/demo/artifact OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-fast: $(READY)  ## an answer in 3 minutes: nothing slow, no vendor's tools, no app
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m 'not slow and not npu and not android'

check: $(READY) docs  ## report errors of style, types, import directions and the manual
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --verbose

docs: $(READY)  ## the manual, into build/docs; a dead link, a missing page or any other warning is an error
	$(BIN)/sphinx-build --fail-on-warning --nitpicky --keep-going --quiet docs build/docs

fix: $(READY)  ## mend what can be mended by itself
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## remove what the demo made; .venv stays
	rm -rf build

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
