"""What is said of files in guests, and what may be said to them. Pure."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from enum import StrEnum

from stratabox.storage.model.errors import InvalidArgumentError

LONGEST_PATH = 4095
_STAT = re.compile(rb"([0-9a-f]{1,8}) (\d{1,19}) (\d{1,10}) (\d{1,10}) (-?\d{1,19})")
_OWNER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\$?")
_EARLIEST, _LATEST = -62_135_596_800, 253_402_300_799  # what a Timestamp can hold


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """One file, as the guest tells of it."""

    path: bytes
    mode: int
    """With the bits that say what it is, as stat(2) has them."""
    size: int
    uid: int
    gid: int
    modified: int
    """Seconds since 1970."""


class WriteMode(StrEnum):
    """How a file is written: see WriteMode in files.proto, which has all but the last."""

    REPLACE = "replace"
    CREATE = "create"
    TRUNCATE = "truncate"
    APPEND = "append"
    OVERWRITE = "overwrite"
    """From its beginning on; what it has beyond the new bytes stays."""

    @property
    def is_aside(self) -> bool:
        """The file is there whole, or not at all."""
        return self in (WriteMode.REPLACE, WriteMode.CREATE)


@dataclass(frozen=True, kw_only=True)
class New:
    """What is wanted of a file only where it was not there before."""

    owner: str = ""
    """As user:group; empty: who writes it."""
    mode: int | None = None


NO_WISH = New()


@dataclass(frozen=True, kw_only=True)
class Packed:
    """How the packing of a directory ended."""

    warnings: tuple[str, ...]
    incomplete: bool


def check_path(path: bytes, field: str = "path") -> bytes:
    """A path that can be asked for.

    :raise InvalidArgumentError: when it is not absolute, too long, or has a NUL byte.
    """
    if not path.startswith(b"/"):
        raise InvalidArgumentError(f"{field} is not absolute: begin it with /", field=field)
    if len(path) > LONGEST_PATH:
        raise InvalidArgumentError(f"{field} has more than {LONGEST_PATH} bytes", field=field)
    if b"\0" in path:
        raise InvalidArgumentError(f"{field} has a NUL byte", field=field)
    return path


def check_removable(path: bytes) -> bytes:
    """A path that may be removed with all that is in it: not the guest's root.

    :raise InvalidArgumentError: as `check_path`.
    """
    if posixpath.normpath(check_path(path)).strip(b"/") == b"":
        raise InvalidArgumentError("the root of a guest is not removed", field="path")
    return path


def check_mode(mode: int | None) -> bytes:
    """A mode for chmod; none stays nothing. :raise InvalidArgumentError: beyond 07777."""
    if mode is None:
        return b""
    if not 0 <= mode <= 0o7777:
        raise InvalidArgumentError(f"mode {mode:o} is more than twelve bits", field="mode")
    return b"%04o" % mode


def check_owner(owner: str, group: str) -> bytes:
    """What chown takes; nothing where both are empty.

    :raise InvalidArgumentError: when one can be no name and no number.
    """
    for field, value in (("owner", owner), ("group", group)):
        if value and not _OWNER.fullmatch(value):
            raise InvalidArgumentError(f"{value!r} can be no {field}", field=field)
    return f"{owner}:{group}".encode() if group else owner.encode()


def parse_stat(line: bytes, path: bytes) -> FileInfo | None:
    """Read a line of `file_scripts.STAT`; None: it is none."""
    match = _STAT.fullmatch(line)
    if match is None:
        return None
    size, uid, gid, modified = map(int, match.groups()[1:])
    return FileInfo(
        path=path,
        mode=int(match[1], 16) & 0xFFFF,
        size=size,
        uid=uid & 0xFFFFFFFF,
        gid=gid & 0xFFFFFFFF,
        modified=min(max(modified, _EARLIEST), _LATEST),
    )
