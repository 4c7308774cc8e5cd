"""What the doctor's checks give back, and how they look at the host."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

# Debian keeps mke2fs and others here; an ordinary user's PATH has not got it.
_SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"


class Status(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it is, and what to do where it should be otherwise."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def apt(*packages: str) -> str:
    """Give the command that installs packages."""
    return f"sudo apt-get install --no-install-recommends {' '.join(packages)}"


def find_tool(name: str) -> str | None:
    """Find a program, also where only root's PATH looks."""
    return shutil.which(name) or shutil.which(name, path=_SYSTEM_FOLDERS)


def output_of(*command: str) -> str:
    """Run a short command and give all that it prints; empty when it fails or hangs."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")


def read(path: str | Path) -> str:
    """Give a small file's text; empty when there is none or it may not be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def existing_parent(path: Path) -> Path:
    """Find the nearest folder above a path (or the path itself) that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def first_line(text: str, fallback: str) -> str:
    """Give the first line that says something."""
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else fallback
