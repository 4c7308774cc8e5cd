"""What `make test-systemd` would run is there, and all of it: it is not run every day."""

from __future__ import annotations

import ast
from pathlib import Path

from installed.__main__ import ORDER


def test_every_check_is_run() -> None:
    folder = Path(__file__).with_name("checks")
    assert sorted(path.stem for path in folder.glob("*.py") if path.stem != "conftest") == sorted(
        ORDER
    )
    for name in ORDER:
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert any(each.startswith("test_") for each in names), name
