# One command each, on a bare machine with python3, pip and make. Everything lives in .venv; nothing else is touched.
#
#   make demo    quantize the embedded model to int8, evaluate it, write an accuracy-versus-size report
#   make test    the tests
#   make check   lint and types
#   make bench   the quality, speed and kernel tables beside llama.cpp, OpenVINO and transformers: hours; into bench/
#
# PIP_FLAGS reaches every pip install. Without a GPU, the smaller torch:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?=
BIN := $(VENV)/bin
SETUP := pyproject.toml constraints.txt $(wildcard setup.py)
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_FLAGS)

.PHONY: demo test check bench clean

demo: $(VENV)/demo.ready
	rm -rf demo-w8a8 demo-report
	$(BIN)/mambacompress quantize demo --recipe w8a8 --out demo-w8a8
	$(BIN)/mambacompress evaluate demo-w8a8 --baseline demo --out demo-report
	$(BIN)/mambacompress report demo-report

test: $(VENV)/dev.ready
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_FLAGS)

check: $(VENV)/dev.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/bench.ready
	$(BIN)/python -m benchmarks --out bench
	$(BIN)/python -m benchmarks.speed --out bench/speed.json
	$(BIN)/python -m benchmarks.kernels --out bench/kernels.json

clean:
	rm -rf $(VENV) build dist *.egg-info demo-w8a8 demo-report

# Debian's python3 comes without ensurepip: then pip is put into the environment by the pip that is there.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip install -q --target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip; }

$(VENV)/demo.ready: $(SETUP) | $(BIN)/python
	$(INSTALL) torch==2.13.0 -e '.[eval]'
	touch $@

$(VENV)/dev.ready: $(SETUP) | $(BIN)/python
	$(INSTALL) torch==2.13.0 -e '.[eval,train,dev]'
	touch $@

# llama.cpp is built here, for this processor: its published builds use no instructions beyond a common baseline.
$(VENV)/bench.ready: $(VENV)/dev.ready
	CMAKE_ARGS=-DGGML_NATIVE=ON $(INSTALL) torch==2.13.0 -e '.[bench]'
	touch $@
