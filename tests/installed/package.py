"""The Debian package of this source tree."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A .deb, and the version that its control file and its daemon tell."""

    file: Path
    version: str


def build(work: Path) -> Package:
    """Build it, and put it into a folder.

    :raise CalledProcessError: when a tool failed, which has said why.
    """
    outcome = subprocess.run(
        ["bash", "packaging/deb"],
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    built = _ROOT / outcome.stdout.split()[-1]
    return Package(file=Path(shutil.copy(built, work)), version=built.name.split("_")[1])


def with_version(package: Package, version: str, work: Path) -> Package:
    """Make the same package with another version, as an upgrade to come or one that went.

    :raise CalledProcessError: when dpkg-deb failed, which has said why.
    """
    root = work / f"root-{version}"
    subprocess.run(["dpkg-deb", "--raw-extract", package.file, root], check=True)
    sites = root / "usr/lib/stratabox/lib"
    (metadata,) = sites.glob("python*/site-packages/stratabox-*.dist-info/METADATA")
    for file in (root / "DEBIAN/control", metadata):
        before = file.read_text(encoding="utf-8")
        after = before.replace(f"\nVersion: {package.version}\n", f"\nVersion: {version}\n")
        assert after != before, file
        file.write_text(after, encoding="utf-8")
    # Else dpkg --verify would find METADATA changed.
    sums = root / "DEBIAN/md5sums"
    name = str(metadata.relative_to(root))
    lines = [each for each in sums.read_text(encoding="utf-8").splitlines() if name not in each]
    lines.append(f"{hashlib.md5(metadata.read_bytes(), usedforsecurity=False).hexdigest()}  {name}")
    sums.write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = work / f"stratabox_{version}_amd64.deb"
    quick = ("-Zgzip", "-z1")
    subprocess.run(
        ["dpkg-deb", *quick, "--build", "--root-owner-group", root, made],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    shutil.rmtree(root)
    return Package(file=made, version=version)
