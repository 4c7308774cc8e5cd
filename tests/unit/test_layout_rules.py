"""Rules of the source tree that no other tool holds: what can be checked is a test."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("storage", "daemon", "client", "proto")
LONGEST_MODULE = 500


def modules(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if "_pb2" not in path.name]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in {path}"
            yield node.module or ""


def test_stratabox_is_a_namespace() -> None:
    for root in SOURCE_ROOTS:
        assert (ROOT / root / "stratabox").is_dir()
        assert not (ROOT / root / "stratabox" / "__init__.py").exists()
        assert not (ROOT / root / "__init__.py").exists()


def test_every_package_has_its_init_and_says_that_it_is_typed() -> None:
    for root in ("storage", "daemon", "client"):
        top = ROOT / root / "stratabox" / root
        assert (top / "py.typed").exists()
        for path in modules(f"{root}/stratabox/{root}"):
            assert (path.parent / "__init__.py").exists(), path.parent


@pytest.mark.parametrize("root", ["storage", "daemon", "client", "tests", "scripts", "bench"])
def test_modules_are_short(root: str) -> None:
    for path in modules(root):
        length = len(path.read_text(encoding="utf-8").splitlines())
        assert length <= LONGEST_MODULE, f"{path.relative_to(ROOT)} has {length} lines: split it"


def test_modules_of_ours_have_docstrings_that_say_something() -> None:
    for path in modules("storage", "daemon", "client"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert len(text) > 10, path
        assert "TODO" not in text, path


def test_import_contracts() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    command = [str(tool), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_words_know_only_the_standard_library() -> None:
    for path in modules("storage/stratabox/storage/model"):
        for name in imported(path):
            top = name.partition(".")[0]
            assert name.startswith("stratabox.storage.model") or top in sys.stdlib_module_names, (
                f"{path.relative_to(ROOT)} imports {name}"
            )


def test_only_the_hypervisor_package_knows_qemu_and_libvirt() -> None:
    for path in modules("storage", "daemon", "client"):
        if "hypervisor" not in path.parts:
            found = {"qemu", "libvirt"} & {name.partition(".")[0] for name in imported(path)}
            assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_only_the_packages_of_services_and_the_client_know_grpc() -> None:
    for path in modules("storage", "daemon"):
        if not {"api", "rpc", "tenki"} & set(path.parts):
            tops = {name.partition(".")[0] for name in imported(path)}
            assert "grpc" not in tops, path.relative_to(ROOT)


def test_generated_code_is_not_in_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    # Whoever owns the checkout: else git refuses to look at another user's.
    safe = "safe.directory=*"
    command = ["git", "-c", safe, "ls-files", "--", "*_pb2*", "*.egg-info*", ".venv/*"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not listed.stdout


def test_the_version_is_in_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{project['version']}] - " in text


def test_the_lock_names_no_host_and_no_path_of_this_machine() -> None:
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        assert "==" in line, line
        assert "/" not in line, line
        assert not line.startswith("-"), line


def test_the_lock_has_all_that_is_asked_for() -> None:
    """A dependency that was added without `make lock` is missing on every other machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    asked = [
        *project["project"]["dependencies"],
        *(each for extra in extras.values() for each in extra if not each.startswith("stratabox")),
        *project["dependency-groups"]["dev"],
    ]
    names = {re.split(r"[^A-Za-z0-9._-]", each)[0].replace(".", "-").lower() for each in asked}
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").lower()
    locked = {line.partition("==")[0].replace(".", "-") for line in lock.splitlines()}
    assert names <= locked, f"run make lock: {sorted(names - locked)}"


def test_generator_and_runtime_pins_agree() -> None:
    """Generated code refuses a runtime older than its generator."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    generators = {
        requirement
        for requirement in project["build-system"]["requires"]
        if not requirement.startswith("hatchling")
    }
    assert generators <= set(project["dependency-groups"]["dev"])
    (tools,) = (name for name in generators if name.startswith("grpcio-tools"))
    assert f"grpcio>={tools.partition('==')[2]}" in project["project"]["dependencies"]


def test_the_table_of_configuration_keys_is_in_step() -> None:
    path = ROOT / "scripts" / "update_docs.py"
    spec = importlib.util.spec_from_file_location("update_docs", path)
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.updated(page) == page, "run make docs"
