"""The only caller of qemu-img.

Formats are always named (-f, -F, -O), never probed; stdin is closed; options that carry names are
made of names that we made. The functions block: call them from a thread. None of them opens a file
that came from outside: imports go through ``stratabox.daemon.images.importer``, which confines
what it runs and borrows `convert_command` from here.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.model.errors import (
    CorruptError,
    DeniedError,
    FailedError,
    InvalidArgumentError,
    NoSpaceError,
    StrataboxError,
)
from stratabox.storage.qcow2 import header

TOOL = "qemu-img"
LEAKS_ONLY = 3
_NO_SPACE = ("No space left on device", "Disk quota exceeded")


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What ``qemu-img check`` found in one file, its backing files not included."""

    corruptions: int
    leaked_clusters: int

    @property
    def clean(self) -> bool:
        """No corruption. Leaked clusters waste space and harm nothing."""
        return self.corruptions == 0


def create_disk(path: Path, size: int) -> None:
    """Make an empty qcow2 of `size` bytes that stands alone.

    :raise NoSpaceError: NO_SPACE.
    :raise DeniedError: TOOL_MISSING.
    :raise FailedError: QEMU_IMG_FAILED.
    """
    _run(["create", "-q", "-f", "qcow2", _file(path), str(size)])


def convert(
    source: Path, target: Path, *, source_format: str, target_format: str = "qcow2"
) -> None:
    """Copy the content of a disk into a fresh file that stands alone; zeros stay holes.

    The target is not fsynced. Raises as `create_disk`.
    """
    _run(
        convert_command(
            _file(source), _file(target), source_format=source_format, target_format=target_format
        )[1:]
    )


def convert_command(
    source: str,
    target: str,
    *,
    source_format: str,
    target_format: str = "qcow2",
    into_existing: bool = False,
) -> list[str]:
    """The argument vector of `convert`, for callers that confine or cancel it.

    :param into_existing: The target is there, empty and large enough: it is not made anew.
    """
    # Of an existing target it must be said that it reads as zeros, or zeros would be written.
    existing = ["-n", "--target-is-zero"] if into_existing else []
    formats = ["-f", source_format, "-O", target_format]
    return [TOOL, "convert", *formats, *existing, source, target]


def resize(path: Path, size: int) -> None:
    """Set the virtual size of a qcow2 that stands alone. Raises as `create_disk`."""
    _run(["resize", "-q", "-f", "qcow2", _file(path), str(size)])


def check(path: Path) -> CheckResult:
    """Check the metadata of a qcow2 that nobody writes. The file is not changed.

    Its backing file is not opened: what its header names may be gone, and is not looked at.

    :raise CorruptError: LAYER_CORRUPT, when it is so broken that it cannot be checked.
    :raise DeniedError: TOOL_MISSING.
    """
    file = {"driver": "file", "filename": _file(path)}
    alone = json.dumps({"driver": "qcow2", "file": file, "backing": None})
    done = _spawn(check_command(f"json:{alone}", "--output=json")[1:])
    # 0: fine, 2: corruptions; 1 and 63: not checked.
    if done.returncode not in (0, 2, LEAKS_ONLY):
        raise CorruptError(
            f"{path.name} cannot be checked: {_tail(done.stderr)}", reason="LAYER_CORRUPT"
        )
    report = json.loads(done.stdout)
    return CheckResult(
        corruptions=int(report.get("corruptions", 0)) + int(report.get("check-errors", 0)),
        leaked_clusters=int(report.get("leaks", 0)),
    )


def check_command(path: str, *options: str) -> list[str]:
    """The argument vector of `check`, for callers that confine it.

    Its exit code is 0 for a clean file, `LEAKS_ONLY` for one that wastes space and is sound.
    """
    return [TOOL, "check", "-f", "qcow2", *options, path]


def virtual_size(path: Path) -> int:
    """Bytes of the disk in a qcow2 of ours; its backing file is not opened.

    :raise CorruptError: LAYER_CORRUPT, when it is no qcow2.
    """
    with path.open("rb") as file:
        head = file.read(header.HEAD_BYTES)
    try:
        return header.parse(head).virtual_size
    except InvalidArgumentError as error:
        raise CorruptError(f"{path.name}: {error.message}", reason="LAYER_CORRUPT") from error


def failure(done: subprocess.CompletedProcess[bytes], *, what: str) -> StrataboxError:
    """The typed error for a qemu-img that ended badly: NO_SPACE, or QEMU_IMG_FAILED."""
    text = _tail(done.stderr)
    if any(sign in text for sign in _NO_SPACE):
        return NoSpaceError(f"No space left on the host's disk: {text}", reason="NO_SPACE")
    return FailedError(f"qemu-img {what} failed: {text}", reason="QEMU_IMG_FAILED")


def _run(arguments: Sequence[str]) -> None:
    done = _spawn(arguments)
    if done.returncode:
        raise failure(done, what=arguments[0])


def _spawn(arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            [TOOL, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise missing_tool() from None


def missing_tool() -> DeniedError:
    """The error for a host without qemu-img."""
    return DeniedError(
        "qemu-img is missing: install the package qemu-utils.",
        reason="TOOL_MISSING",
        tool=TOOL,
        package="qemu-utils",
    )


def _file(path: Path) -> str:
    """A name that qemu-img takes for a plain file whatever is in it: absolute, no protocol."""
    return str(path.absolute())


def _tail(output: bytes) -> str:
    return output.decode(errors="replace").strip()[-2000:]
