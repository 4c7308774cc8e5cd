"""Limits by control groups that hold, in a kernel that has them: a Debian guest's, with systemd."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import stratabox.daemon
import stratabox.storage
from stratabox.client import Sandbox

Shell = Callable[[Sandbox, str], str]

TRIAL = Path(__file__).parents[1] / "support/cgroup_trial.py"
OWN = "/sys/fs/cgroup/stratabox-test"


def sources() -> bytes:
    """What the trial is made of, as a tar."""
    made = io.BytesIO()
    jeepney = find_spec("jeepney")
    assert jeepney is not None
    assert jeepney.origin is not None
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.add(TRIAL, TRIAL.name)
        for top, name in (
            (Path(stratabox.daemon.__path__[0]), "stratabox/daemon"),
            (Path(stratabox.storage.__path__[0]), "stratabox/storage"),
            (Path(jeepney.origin).parent, "jeepney"),
        ):
            for path in top.rglob("*.py"):
                tar.add(path, f"{name}/{path.relative_to(top)}")
    return made.getvalue()


@pytest.fixture(scope="module")
def prepared(debian_box: Sandbox) -> Sandbox:
    """A guest with systemd, and the trial in it."""
    debian_box.files.write("/srv/trial.tar", sources())
    debian_box.execute("mkdir -p /srv/state && tar -x -f /srv/trial.tar -C /srv").check()
    return debian_box


def tried(sandbox: Sandbox, before: str, *options: str) -> dict[str, Any]:
    options = ("--state-dir", "/srv/state", "--cgroups-io-write-bandwidth", "7MiB", *options)
    line = f"cd /srv && {before} /usr/bin/python3 /srv/{TRIAL.name} {' '.join(options)}"
    result = sandbox.execute(line, timeout=120)
    assert result.exit_code == 0, result
    answer = json.loads(result.stdout_text.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def held(answer: dict[str, Any]) -> None:
    """Everything was told to the kernel, and held by it; nothing is left."""
    assert (answer["held"], answer["why"]) == (["cpu", "io", "memory", "pids"], "")
    told = answer["told"]
    assert told["memory.max"] == [str(64 << 20)]
    assert told["cpu.max"] == ["20000", "100000"]
    assert told["pids.max"] == ["8"]
    assert f"wbps={7 << 20}" in told["io.max"]
    assert answer["hog"] == [-9, ""]
    assert answer["threads"] == 7
    assert answer["throttled"]
    assert answer["gone"]


def test_scopes_of_systemd(prepared: Sandbox) -> None:
    run = "systemd-run --quiet --wait --pipe -p WorkingDirectory=/srv"
    answer = tried(prepared, run)
    held(answer)
    assert answer["by"] == "systemd"
    assert answer["place"].endswith("/stratabox.slice")


def test_groups_of_our_own(prepared: Sandbox, sh: Shell) -> None:
    sh(prepared, f"mkdir {OWN}")
    answer = tried(prepared, "", "--cgroups-folder", OWN)
    held(answer)
    assert answer["place"] == f"{OWN}/store"
    assert sh(prepared, f"ls -d {OWN}/*/ 2>/dev/null || true") == ""
    sh(prepared, f"rmdir {OWN}")
