"""What `make test-kvm` would run is there: it is not run every day."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from kvm.selection import TESTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("argument", TESTS)
def test_each_one_exists(argument: str) -> None:
    file, _, name = argument.removeprefix("--deselect=").partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = {node.name for node in tree.body if isinstance(node, functions)}
    assert {each for each in names if each.startswith("test_")}
    assert not name or name.partition("[")[0] in names
