"""What a guest says when something fails with a file, as our errors. Pure.

The words are those of the C library (strerror), of shells and of a few programs, in the C locale:
they stand behind the last colon of a line.
"""

from __future__ import annotations

from stratabox.daemon.hypervisor.guest.pipe import Ended
from stratabox.storage.model.errors import (
    AlreadyExistsError,
    DeniedError,
    FailedError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    StrataboxError,
)

_SHOWN = 300

_Kind = tuple[type[StrataboxError], str, str]

_GONE: _Kind = (NotFoundError, "FILE_NOT_FOUND", "there is no such file")
_EXISTS: _Kind = (AlreadyExistsError, "FILE_EXISTS", "there is a file already")
_NO_FOLDER: _Kind = (
    DeniedError,
    "NOT_A_DIRECTORY",
    "it is not a directory, or one above it is not",
)
_FOLDER: _Kind = (DeniedError, "IS_A_DIRECTORY", "it is a directory")
_FULL_FOLDER: _Kind = (DeniedError, "DIRECTORY_NOT_EMPTY", "the directory is not empty")
_DENIED: _Kind = (DeniedError, "PERMISSION_DENIED", "the guest does not permit that")
_READ_ONLY: _Kind = (
    DeniedError, "READ_ONLY_FILE_SYSTEM", "its file system in the guest is read-only",
)  # fmt: skip
_FULL: _Kind = (
    NoSpaceError, "GUEST_NO_SPACE", "the guest's file system is full: remove something there",
)  # fmt: skip
_LONG: _Kind = (InvalidArgumentError, "INVALID_ARGUMENT", "its name is too long for the guest")
_NO_USER: _Kind = (NotFoundError, "USER_NOT_FOUND", "the guest has no such user or group")
_NO_TOOL: _Kind = (DeniedError, "GUEST_TOOL_MISSING", "the guest has not the program for that")

_ENDS: tuple[tuple[str, _Kind], ...] = (
    ("no such file or directory", _GONE),
    ("no such file", _GONE),
    ("nonexistent directory", _GONE),
    ("directory nonexistent", _GONE),
    ("file exists", _EXISTS),
    ("not a directory", _NO_FOLDER),
    ("is a directory", _FOLDER),
    ("directory not empty", _FULL_FOLDER),
    ("permission denied", _DENIED),
    ("operation not permitted", _DENIED),
    ("read-only file system", _READ_ONLY),
    ("no space left on device", _FULL),
    ("disk quota exceeded", _FULL),
    ("file name too long", _LONG),
    ("filename too long", _LONG),
    ("command not found", _NO_TOOL),
    (": not found", _NO_TOOL),
    ("does not exist", _NO_USER),
    ("does not exist or the user entry does not contain all the required fields", _NO_USER),
)
_WITHIN: tuple[tuple[str, _Kind], ...] = (
    ("cannot overwrite directory", _FOLDER),
    ("cannot overwrite non-directory", _NO_FOLDER),
    ("invalid user", _NO_USER),
    ("invalid group", _NO_USER),
    ("unknown user", _NO_USER),
    ("unknown group", _NO_USER),
)
_NO_PROGRAM = 127


def printable(path: bytes) -> str:
    """A path for messages and metadata."""
    return path.decode("utf-8", "backslashreplace")


def failure(ended: Ended, path: bytes, *, told: bool = False) -> StrataboxError:
    """Why a command ended as it did.

    :param told: say the guest's own words too: they name another file than `path`.
    """
    lines = [line.strip() for line in ended.words.decode(errors="replace").splitlines()]
    said = [line for line in lines if line]
    for line in said:
        if kind := _kind(line):
            return _error(kind, path, f" ({line[:_SHOWN]})" if told else "")
    if ended.status == _NO_PROGRAM:
        return _error(_NO_TOOL, path)
    words = "; ".join(said)[-_SHOWN:] or f"it ended with {ended.status}, and said nothing"
    return FailedError(
        f"{printable(path)}: the guest says: {words}", reason="FILE_FAILED", path=printable(path)
    )


def gone(path: bytes) -> StrataboxError:
    """There is no such file."""
    return _error(_GONE, path)


def denied(path: bytes) -> StrataboxError:
    """The guest does not permit that."""
    return _error(_DENIED, path)


def failed(path: bytes, words: str) -> StrataboxError:
    """Whatever else the guest said."""
    return failure(Ended(1, words.encode()), path)


def _kind(line: str) -> _Kind | None:
    lower = line.lower()
    for end, kind in _ENDS:
        if lower.endswith(end):
            return kind
    # Before the path, which could hold anything.
    beginning = lower.partition("'")[0].partition("`")[0]
    for words, kind in _WITHIN:
        if words in beginning:
            return kind
    return None


def _error(kind: _Kind, path: bytes, more: str = "") -> StrataboxError:
    cls, reason, words = kind
    return cls(f"{printable(path)}: {words}{more}", reason=reason, path=printable(path))
