# Everything lives in .venv/, made by scripts/setup; the stamps in there make a second run instant.
# `make demo` needs less of the host than the other targets, so it has a set-up of its own.

PYTHON := .venv/bin/python
INPUTS := scripts/setup pyproject.toml requirements.lock hatch_build.py \
          $(wildcard proto/stratabox/*/*.proto proto/stratabox/*/*/*.proto daemon/stratabox/daemon/hypervisor/*.[ch] \
                      daemon/stratabox/daemon/hypervisor/*/*.[ch])
PYTEST_ARGS ?=
WORKERS ?= 2
KVM_ARGS ?=
SYSTEMD_ARGS ?=
BENCH_ARGS ?=
MINUTES ?= 10

.PHONY: help demo deb test test-libvirt test-kvm test-systemd soak bench lint check proto docs lock coverage clean

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

demo: .venv/.ready-demo ## watch a real guest being created, snapshotted, restored, cloned, deleted
	@$(PYTHON) scripts/demo.py

# Each file's tests stay together, and share a daemon and its guests. WORKERS=0: one after the other.
test: .venv/.ready-test ## run all tests (PYTEST_ARGS="-m 'not guest'" for the quick ones)
	@$(PYTHON) -m pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# A libvirtd of its own for each worker, beside the host's.
test-libvirt: .venv/.ready-test ## run all tests of guests with libvirt as the launcher
	@STRATABOX_LAUNCHER=libvirt $(PYTHON) -m pytest --numprocesses $(WORKERS) --dist loadfile \
		-m guest $(PYTEST_ARGS)

# Needs no KVM of the host: its guest's emulated CPU has one. KVM_ARGS="--release bookworm" for another
# kernel, Python and QEMU in there, KVM_ARGS="-k reboot tests/integration/test_memory.py" for others.
test-kvm: .venv/.ready-test ## run the memory engine's tests with accel=kvm, inside an emulated machine
	@PYTHONPATH=tests $(PYTHON) -m kvm $(KVM_ARGS)

# The package is installed in guests and containers with systemd. SYSTEMD_ARGS="-k first_call" for some of the checks.
test-systemd: .venv/.ready-test ## run the units and the Debian package for real, under systemd
	@PYTHONPATH=tests $(PYTHON) -m installed $(SYSTEMD_ARGS)

# At least MINUTES, and what must be: 200 kills, 30 cuts of power, 200 snapshots one a second. Prints
# its seed; STRATABOX_SOAK_SEED repeats it.
soak: .venv/.ready-test ## faults at random moments, for a long time (MINUTES=10)
	@$(PYTHON) tests/soak/__main__.py --minutes $(MINUTES)

# BENCH_ARGS="--only restore pause" for some of the figures, "--json FILE" for another file.
bench: .venv/.ready-test ## measure the memory engine against raw QEMU, as a table and as JSON
	@$(PYTHON) -m bench $(BENCH_ARGS)

# RELEASE=trixie or noble for their Python; the default is bookworm's.
deb: .venv/.ready-test ## build a Debian package, dist/stratabox_VERSION_amd64.deb
	@bash packaging/deb $(RELEASE)

lint: .venv/.ready-test ## ruff, import contracts, buf, shellcheck, mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/buf lint
	.venv/bin/buf format --diff --exit-code
	@if command -v shellcheck >/dev/null; then set -x; shellcheck scripts/setup packaging/deb packaging/p*inst packaging/p*rm .ci/run; fi
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
