"""The Debian package of this source tree."""

from __future__ import annotations

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
