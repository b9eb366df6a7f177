# Every target works from a fresh clone: it sets up what it needs and nothing else has to be typed.
#   make train   the main job: a language model in fp32, then in int8 with an 8-bit optimizer
#   make test    lint, type check, tests; what CI runs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FLOOR := .venv-floor

.PHONY: train test lint unit docs cuda-compile cuda-roofline slow fuzz gpu bench quality floor wheel release clean

train: $(STAMP)
	$(BIN)/python examples/train_gpt.py $(ARGS)

test: lint unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes, each with files of its own. To debug one test: .venv/bin/python -m pytest tests/optim/test_base.py
unit: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# The site, in build/site; `make unit` builds it too, and runs every code block of it.
docs: $(STAMP)
	$(BIN)/python -m sphinx --fail-on-warning --nitpicky --keep-going --quiet docs build/site
	@echo "open build/site/index.html"

cuda-compile: $(STAMP)
	$(BIN)/python -m pytest -m six_architectures $(ARGS)

# Issue slots, traffic and limits of every CUDA kernel, computed: no GPU is needed. ARGS="--only adamw --json FILE"
cuda-roofline: $(STAMP)
	$(BIN)/python benchmarks/cuda_roofline.py $(ARGS)

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 1800 $(ARGS)

# Hostile values between guard pages, the CPU backend beside the reference: ARGS="--seconds 3600 --seed 1"
fuzz: $(STAMP)
	PYTHONPATH=.:tests $(BIN)/python -m support.fuzz --flags=-O1 --seconds 300 $(ARGS)

# On a machine with a GPU: its own python with its own CUDA build of torch; nothing is installed. (The example wants
# omegaconf, which such a machine need not have.)
gpu:
	PYTHONPATH=. python benchmarks/gpu_parts.py $(ARGS)

# Every benchmark in a small size, beside the rivals that are installed: a quarter of an hour on two cores. Writes
# docs/benchmarks/DATE-all-cpu.md. For one part: make bench ARGS="--only int8_linear"
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[benchmarks]'
	$(BIN)/python benchmarks/run_all.py $(ARGS)

# What 8 bits cost: int8 products beside bf16 ones, then every optimizer at 32 and 8 bits on two small models, into
# docs/benchmarks. It takes an hour.
quality: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[benchmarks]'
	$(BIN)/python benchmarks/int8_quality.py --output docs/benchmarks
	$(BIN)/python benchmarks/int8_vision_quality.py --output docs/benchmarks
	$(BIN)/python benchmarks/optimizer_quality.py --output docs/benchmarks

# The oldest torch and Lightning the package claims, in an environment of their own. (That Lightning calls names that
# jsonargparse has deprecated since.)
floor: export JSONARGPARSE_DEPRECATION_WARNINGS = off
floor: $(FLOOR)/.installed
	$(FLOOR)/bin/python -m pytest --numprocesses 2 --dist loadfile -p no:cacheprovider $(ARGS)

wheel: $(STAMP)
	rm -rf build/wheel dist
	$(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd build/wheel && bin/python -I ../../tests/wheel_smoke.py

# All that a release needs: the wheel; sdist and wheel in clean environments of the oldest and the newest versions, on
# the oldest and the newest Python that are installed; the suite on the oldest versions; the slow tests. It takes hours.
release: $(STAMP)
	$(MAKE) wheel
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python .ci/check_built.py dist
	$(MAKE) floor
	$(MAKE) slow

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	    sys.exit(None if (3, 10) <= v < (3, 14) else "$(PYTHON) is Python %d.%d; 3.10 to 3.13 is needed: " \
	    "make PYTHON=/path/to/python3.11 ..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(FLOOR)/.installed: pyproject.toml constraints-floor.txt
	test -x $(FLOOR)/bin/python || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet -c constraints-floor.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(FLOOR) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
