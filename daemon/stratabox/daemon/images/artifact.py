"""What every builder hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str, float | None], None]
"""Told what is being done, in words, and how far the whole is: 0 to 1, None where unknown."""


@dataclass(frozen=True, kw_only=True)
class BuiltImage:
    """The files of an image, in the folder that its builder was given. Not fsynced."""

    disk: Path
    """A qcow2 that stands alone; its virtual size is a whole number of GiB."""
    kernel: Path | None
    initrd: Path | None
    """Kernel and initrd are both there, or neither: then the disk boots by itself."""
    command_line: str
    origin: str
    """What it was made from: "debian bookworm", "tiny" or "import"."""
    cloud_init: bool = False
    """Its guests set themselves up by a seed."""


def no_progress(step: str, fraction: float | None) -> None:
    """A `Progress` for callers that do not care."""
