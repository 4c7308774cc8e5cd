# Everything lives in .venv/, made by scripts/setup; the stamps in there make a second run instant.
# `make demo` needs less of the host than the other targets, so it has a set-up of its own.

PYTHON := .venv/bin/python
INPUTS := scripts/setup pyproject.toml requirements.lock hatch_build.py \
          $(wildcard proto/stratabox/*/*.proto)
PYTEST_ARGS ?=

.PHONY: help demo test soak lint check proto docs lock coverage clean

help: ## say what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

demo: .venv/.ready-demo ## watch a real guest being created, snapshotted, restored, cloned, deleted
	@$(PYTHON) scripts/demo.py

test: .venv/.ready-test ## run all tests (PYTEST_ARGS="-m 'not guest'" for the quick ones)
	@$(PYTHON) -m pytest $(PYTEST_ARGS)

# SIGKILLs the daemon at random moments under load; STRATABOX_SOAK_SEED repeats the moments.
soak: .venv/.ready-test ## kill the daemon at 200 random moments (STRATABOX_SOAK_KILLS=N for others)
	@STRATABOX_SOAK_KILLS=$${STRATABOX_SOAK_KILLS:-200} $(PYTHON) -m pytest \
		tests/integration/test_random_kills.py -s --timeout 7200

lint: .venv/.ready-test ## ruff, import contracts, buf, shellcheck, mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/buf lint
	.venv/bin/buf format --diff --exit-code
	@if command -v shellcheck >/dev/null; then set -x; shellcheck scripts/setup .ci/run; fi
	.venv/bin/mypy

check: .venv/.ready-test ## what CI runs
	@bash .ci/run

proto: .venv/.ready-test ## generate the gRPC code again, in place
	@.venv/bin/pip install --quiet --no-deps --no-build-isolation --editable .

docs: .venv/.ready-test ## write the generated parts of docs/ again
	@$(PYTHON) scripts/update_docs.py

# Keeps the pins that still fit; `make lock UPGRADE=--upgrade` takes the newest of everything.
lock: .venv/.ready-test ## write requirements.lock again
	@.venv/bin/uv pip compile --quiet --universal --python-version 3.11 $(UPGRADE) \
		--extra daemon --extra libvirt --group dev \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links \
		--output-file requirements.lock pyproject.toml

coverage: .venv/.ready-test ## run all tests and report what they did not reach
	@$(PYTHON) -m coverage run -m pytest $(PYTEST_ARGS)
	@$(PYTHON) -m coverage combine --quiet
	@$(PYTHON) -m coverage report --skip-covered

clean: ## remove all that make has made here
	rm -rf .venv build dist .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find proto -name '*_pb2*' -delete

.venv/.ready-%: $(INPUTS)
	@scripts/setup $*
