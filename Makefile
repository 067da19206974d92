# make demo    a sheet of pictures from nothing: fetches ONNX Runtime's library, builds, paints
# make test    every check and test, Rust and Python; sets itself up
# make graphs  exports the committed graphs anew

PYTHON ?= python3
VENV := .venv/bin
CARGO := cargo
ORT_VERSION := $(shell sed -n 's/^onnxruntime==//p' export/requirements.lock)
# Older than the oldest version that the engine accepts: what the refusal of an old library is tested with.
OLD_ORT_VERSION := 1.22.1
STAMPS := target/stamps
PARITY := target/parity
# The tests' own models and their catalogue.
TINY := tests/models
export CARGO_TARGET_DIR := $(CURDIR)/target
RELEASE := target/release
EXPORT := $(shell find export -name '*.py' -not -path '*/tests/*') export/requirements.lock

.PHONY: demo build test lint rust-test python-test graphs clean
.DELETE_ON_ERROR:

demo: build $(STAMPS)/ort-$(ORT_VERSION)
	$(RELEASE)/tronie demo --output out/demo.png

build:
	$(CARGO) build --release --locked

# The library of the wheel, beside the executable, where tronie looks first.
$(STAMPS)/ort-$(ORT_VERSION):
	$(PYTHON) export/fetch_onnxruntime.py $(ORT_VERSION) $(RELEASE)
	mkdir -p $(@D) && touch $@

$(STAMPS)/ort-$(OLD_ORT_VERSION):
	$(PYTHON) export/fetch_onnxruntime.py $(OLD_ORT_VERSION) target/old-onnxruntime
	mkdir -p $(@D) && touch $@

$(STAMPS)/venv: export/requirements.lock
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet uv
	$(VENV)/uv pip install --quiet --compile-bytecode --python $(VENV)/python -r export/requirements.lock
	mkdir -p $(@D) && touch $@

# What diffusers makes of random checkpoints, to compare with; made again when the exporter changes.
$(STAMPS)/parity: $(STAMPS)/venv $(EXPORT)
	rm -rf $(PARITY) && mkdir -p $(PARITY)
	$(VENV)/python -W ignore -m export.golden parity --out $(PARITY)
	mkdir -p $(@D) && touch $@

test: lint rust-test python-test

lint: $(STAMPS)/venv
	$(CARGO) fmt --check
	$(CARGO) clippy --release --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --locked --no-deps
	$(VENV)/ruff check export
	$(VENV)/ruff check --config export/pyproject.toml benches
	$(VENV)/ruff format --check --config export/pyproject.toml export benches

rust-test: $(STAMPS)/ort-$(ORT_VERSION) $(STAMPS)/ort-$(OLD_ORT_VERSION) $(STAMPS)/parity
	TRONIE_PARITY=$(CURDIR)/$(PARITY) TRONIE_OLD_ORT=$(CURDIR)/target/old-onnxruntime ORT_DYLIB_PATH=$(CURDIR)/$(RELEASE) \
	    $(CARGO) test --release --locked

# The executable that the Rust tests run: without their dependencies' features it would be compiled a second time.
python-test: $(STAMPS)/venv $(STAMPS)/ort-$(ORT_VERSION)
	$(CARGO) test --release --locked --no-run --test executable
	$(VENV)/python -m pytest export/tests

graphs: $(STAMPS)/venv
	for model in tiny tiny-refiner; do $(VENV)/python -m export model $(TINY)/$$model --name $$model --out $(TINY) --steps 20 --licence "MIT OR Apache-2.0"; done
	for name in ip-adapter ip-adapter-plus ip-adapter-plus-face; do $(VENV)/python -m export adapter \
	    $(TINY)/tiny-adapters/sdxl_models/$${name}_sdxl_vit-h.safetensors --image-encoder $(TINY)/tiny-adapters/models/image_encoder \
	    --for tiny --name $$name --out $(TINY); done
	$(VENV)/python -m export adapter $(TINY)/tiny-adapters/ip-adapter-faceid_sdxl.safetensors \
	    --for tiny --name ip-adapter-faceid --out $(TINY)
	$(VENV)/python -m export demo models --out .
	for model in sdxl-base sdxl-refiner; do $(VENV)/python -m export graphs $$model --out .; done
	$(VENV)/python -m export variants sdxl-base --out .
	$(VENV)/python -m export.golden half --out tests/golden/half

clean:
	rm -rf target out .venv
