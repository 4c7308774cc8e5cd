"""The list of failpoints is what the source has; arming is all or nothing."""

from __future__ import annotations

import ast
import errno
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratabox.storage import failpoints
from stratabox.storage.failpoints import NAMES, hit
from support.rig import eventually

ROOT = Path(__file__).resolve().parents[2]


def hits() -> Iterator[tuple[str, ast.expr]]:
    """Every call of hit() in the source, with where it is."""
    for folder in ("storage", "daemon", "client"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    name = node.func
                    called = name.id if isinstance(name, ast.Name) else getattr(name, "attr", "")
                    if called == "hit" and node.args:
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", node.args[0]


def test_every_name_is_hit_and_every_hit_is_listed() -> None:
    found: dict[str, list[str]] = {}
    for where, argument in hits():
        assert isinstance(argument, ast.Constant), f"{where}: the name must be plain to see"
        assert isinstance(argument.value, str), where
        found.setdefault(argument.value, []).append(where)
    assert set(NAMES) - set(found) == set(), "listed and never hit"
    assert set(found) - set(NAMES) == set(), f"hit and not listed: {found}"


def test_names_are_well_formed_and_listed_once() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for name in NAMES:
        operation, _, step = name.partition(".")
        assert operation.replace("-", "").isalpha(), name
        assert step.replace("-", "").isalpha(), name
        assert name == name.lower()


def test_nothing_is_armed_as_a_rule() -> None:
    for name in NAMES:
        hit(name)


def test_each_point_does_what_it_was_told(
    arm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    arm("create.row-written=error,sweep.unlinked=nospace,,boot.started=sleep:2.5")
    with pytest.raises(OSError, match=r"create\.row-written") as broken:
        hit("create.row-written")
    with pytest.raises(OSError, match=r"sweep\.unlinked") as full:
        hit("sweep.unlinked")
    assert (broken.value.errno, full.value.errno) == (errno.EIO, errno.ENOSPC)
    hit("boot.started")
    hit("sweep.tombstoned")
    assert slept == [2.5]
    arm("")
    hit("create.row-written")


def test_a_failure_can_be_counted(arm: Callable[[str], None]) -> None:
    arm("image.built=error:2")
    for _ in range(2):
        with pytest.raises(OSError, match="failpoint"):
            hit("image.built")
    hit("image.built")


def test_a_point_can_stand_still(arm: Callable[[str], None], tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    arm(f"image.built=hold:{reached}")
    passing = threading.Thread(target=hit, args=("image.built",))
    passing.start()
    eventually(reached.exists)
    assert passing.is_alive()
    reached.unlink()
    passing.join()
    hit("image.built")  # the first time only
    assert not reached.exists()


def test_kill_is_a_kill() -> None:
    script = (
        "from stratabox.storage import failpoints as f; import atexit;"
        "atexit.register(print, 'a handler ran'); f.arm('image.built=kill'); f.hit('image.built')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -9
    assert done.stdout == b""


@pytest.mark.parametrize(
    "text",
    [
        "create.row-written", "create.row-written=", "create.row-written=explode",
        "create.row-writen=kill", "=kill", "kill", "create.row-written=sleep",
        "create.row-written=sleep:", "create.row-written=sleep:soon", "create.row-written=sleep:-1",
        "create.row-written=sleep:nan", "create.row-written=kill ", " create.row-written=kill",
        "create.row-written=hold", "create.row-written=hold:here", "create.row-written=hold:",
        "create.row-written=error:", "create.row-written=error:0", "create.row-written=kill:0",
        "create.row-written=kill=kill", "sweep.unlinked=error,no.such=kill",
    ],
)  # fmt: skip
def test_what_cannot_be_armed_leaves_things_as_they_were(
    arm: Callable[[str], None], text: str
) -> None:
    arm("sweep.tombstoned=error")
    with pytest.raises(ValueError, match=failpoints.ENVIRONMENT):
        arm(text)
    hit("sweep.unlinked")
    with pytest.raises(OSError, match="failpoint"):
        hit("sweep.tombstoned")
