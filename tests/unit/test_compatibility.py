"""docs/compatibility.md has every RPC of Tenki's, and the tests that it names are there."""

from __future__ import annotations

import re
from pathlib import Path

from stratabox.daemon.tenki.services import CONTROL, DATA_PLANE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text("utf-8")


def test_every_rpc_stands_in_the_table() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `") and " yes |" in line]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    for service in (CONTROL, DATA_PLANE):
        assert {method.name for method in service.methods} <= named


def test_every_test_that_it_names_is_there() -> None:
    files = (ROOT / "tests" / "integration").rglob("test_*.py")
    there = {
        name for file in files for name in re.findall(r"def (test_\w+)", file.read_text("utf-8"))
    }
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 20
    assert named <= there
