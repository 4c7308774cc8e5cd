"""What is in the wheel and in the sdist, and that the one comes out of the other unchanged."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# All that git does not keep; other tests make and remove some of it meanwhile.
IGNORED = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
LEFT_OUT = shutil.ignore_patterns(".git", *IGNORED)


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


@pytest.mark.skipif(
    shutil.which("cc") is None or platform.machine() != "x86_64",
    reason="needs a C compiler for x86-64",
)
def test_what_is_made_of_c_is_in_the_wheel(built: tuple[Path, Path]) -> None:
    files = contents(built[0])
    for made in (
        "stratabox/daemon/hypervisor/memory/libdirtytrack.so.1",
        "stratabox/daemon/images/guest/common/usr/libexec/stratabox/wake.1",
    ):
        assert files[made].startswith(b"\x7fELF")


def test_commands(built: tuple[Path, Path]) -> None:
    (entry_points,) = (
        text for name, text in contents(built[0]).items() if name.endswith("entry_points.txt")
    )
    assert b"strataboxd = stratabox.daemon.__main__:main" in entry_points
    assert b"stratabox = stratabox.client.cli:main" in entry_points


PARSER = shutil.which("apparmor_parser", path="/usr/sbin:/sbin")
POLICY = Path("/etc/apparmor.d")


def compiled(policy: Path, profile: Path) -> bytes:
    """A profile as the kernel would get it. Whether the kernel has AppArmor does not matter."""
    assert PARSER is not None
    command = [PARSER, "--skip-kernel-load", "--skip-cache", "--stdout", "--base", str(policy)]
    done = subprocess.run([*command, str(profile)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.skipif(PARSER is None, reason="needs AppArmor's parser (package apparmor)")
def test_apparmor_takes_our_profiles(tmp_path: Path) -> None:
    policy = Path(shutil.copytree(POLICY, tmp_path / "policy"))
    ours = ROOT / "packaging/apparmor"
    text = (ours / "stratabox-confine").read_text()
    if not (POLICY / "abi/4.0").exists():
        # A parser before 4.0 knows all but what is new in it: the one rule that matters there.
        assert text.count("\tuserns,\n") == 1
        text = text.replace("abi/4.0", "abi/3.0").replace("\tuserns,\n", "")
    (policy / "confine").write_text(text)
    assert b"stratabox-confine\0" in compiled(policy, policy / "confine")
    # Made for being included into another one; libvirt's own, where it is.
    (policy / "local").mkdir(exist_ok=True)
    (policy / "local/usr.sbin.libvirtd").write_text("")
    libvirtd = policy / "usr.sbin.libvirtd"
    if not libvirtd.exists():
        libvirtd.write_text("profile libvirtd { include <local/usr.sbin.libvirtd> }\n")
    without = compiled(policy, libvirtd)
    shutil.copy(ours / "libvirtd", policy / "local/usr.sbin.libvirtd")
    assert len(compiled(policy, libvirtd)) > len(without)


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
