"""The choice of the accelerator where KVM works. Named so that only `make test-kvm` finds it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor import accelerator


async def test_kvm_is_chosen_where_nobody_says_what() -> None:
    chosen = await accelerator.choose()
    assert (chosen.name, chosen.cpu_model) == ("kvm", "host"), chosen.reason
    assert await accelerator.find_obstacle() is None


def test_the_doctor_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stratabox.daemon", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {each["name"]: each for each in json.loads(done.stdout)["checks"]}
    for name in ("accelerator", "kvm-device"):
        assert found[name]["status"] == "ok", found[name]
    assert found["accelerator"]["detail"].startswith("kvm: ")


def test_nothing_runs_on_tcg_unnoticed() -> None:
    with pytest.raises(RuntimeError, match="TCG"):
        subprocess.run(["true", "-accel", "tcg"], check=False)
