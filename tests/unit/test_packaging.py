"""What is in the wheel and in the sdist, and that the one comes out of the other unchanged."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", "__pycache__", "dist", "*_pb2*"
)


def build(what: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{what}"]
    done = subprocess.run(
        [*command, "--outdir", out, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Give a wheel and an sdist, made from a copy without generated code, as a fresh clone is."""
    folder = tmp_path_factory.mktemp("packaging")
    source = Path(shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT))
    return build("wheel", source, folder / "wheel"), build("sdist", source, folder / "sdist")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_nothing_of_ours_lands_outside_our_namespace(built: tuple[Path, Path]) -> None:
    tops = {name.partition("/")[0] for name in contents(built[0])}
    assert {top for top in tops if not top.startswith("stratabox-")} == {"stratabox"}


def test_the_wheel_is_complete(built: tuple[Path, Path]) -> None:
    names = set(contents(built[0]))
    for expected in (
        "stratabox/client/py.typed",
        "stratabox/daemon/__main__.py",
        "stratabox/storage/model/records.py",
        "stratabox/v1/sandboxes_pb2.py",
        "stratabox/v1/sandboxes_pb2_grpc.pyi",
    ):
        assert expected in names
    assert any(name.endswith("lib/systemd/system/strataboxd.service") for name in names)
    for migration in (ROOT / "storage").rglob("*.sql"):
        assert str(migration.relative_to(ROOT / "storage")) in names
    assert "stratabox/__init__.py" not in names


def test_commands(built: tuple[Path, Path]) -> None:
    (entry_points,) = (
        text for name, text in contents(built[0]).items() if name.endswith("entry_points.txt")
    )
    assert b"strataboxd = stratabox.daemon.__main__:main" in entry_points
    assert b"stratabox = stratabox.client.cli:main" in entry_points


def test_the_sdist_is_complete_and_builds_the_same_wheel(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    wheel, sdist = built
    # Not tarfile: Debian 12's has no extraction filters, and newer ones warn when none is named.
    subprocess.run(["tar", "-x", "-f", sdist, "-C", tmp_path], check=True)
    (source,) = tmp_path.iterdir()
    for expected in (
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "requirements.lock",
        "buf.yaml",
        ".ci/run",
        "docs/configuration.md",
        "scripts/setup",
        "systemd/strataboxd.service",
        "tests/unit/test_packaging.py",
    ):
        assert (source / expected).is_file(), expected
    assert not list(source.rglob("*_pb2*"))
    again = build("wheel", source, tmp_path / "again")
    assert contents(again) == contents(wheel)
