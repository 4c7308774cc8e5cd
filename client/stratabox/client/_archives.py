"""Archives on this side: received into FILE.part, and what is needed of their layout to go on.

What is in an archive is the daemon's business; see docs/transfers.md. Here only as much is read of
it as tells where its last whole block ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from stratabox.client.archives import ExportResult
from stratabox.client.errors import InvalidArgumentError
from stratabox.v1 import transfers_pb2 as pb

_MAGIC = b"SBXARC\r\n"
_PREAMBLE = struct.Struct("<8sII32s")  # magic, version, bytes of the manifest, its SHA-256
_HEADER = struct.Struct("<4sIQII32s")  # mark, member, number, bytes stored, of content, sum
_BLOCK, _END = b"SBXB", b"SBXE"


class Sink(Protocol):
    """Where an export goes."""

    @property
    def resume(self) -> pb.ExportResume | None:
        """What was received by an earlier call; None: nothing."""

    def write(self, data: bytes) -> None:
        """The next bytes."""

    def finish(self, content_bytes: int) -> ExportResult:
        """All bytes have come."""

    def close(self) -> None:
        """Whether they have or not."""


@dataclass(frozen=True)
class _Received:
    """What a file holds of an archive."""

    size: int
    """Bytes up to the end of its last whole block."""
    resume: pb.ExportResume | None


def open_sink(target: str | os.PathLike[str] | BinaryIO) -> Sink:
    """Open what an export is written to.

    :raise InvalidArgumentError: when the file is there already, or FILE.part is something else.
    :raise OSError: when it cannot be written.
    """
    if isinstance(target, str | os.PathLike):
        return _FileSink(Path(os.fspath(target)))
    return _StreamSink(target)


class _FileSink:
    """FILE.part, which becomes FILE when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, path.with_name(path.name + ".part")
        if path.exists():
            raise InvalidArgumentError(f"{path} is there already: remove it, or name another file")
        # Made by this call it is for its owner alone: an archive holds whatever the disks hold.
        descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = _received(self._file, self._part)
        except BlockingIOError:
            self._file.close()
            raise InvalidArgumentError(f"another export is writing {self._part}") from None
        except BaseException:
            self._file.close()
            raise
        self.resume, self._resumed = found.resume, found.size
        self._begun = False

    def write(self, data: bytes) -> None:
        """As `Sink` says."""
        if not self._begun:
            # Only now: the daemon has found that it fits.
            self._begun = True
            self._file.truncate(self._resumed)
            self._file.seek(self._resumed)
        self._file.write(data)

    def finish(self, content_bytes: int) -> ExportResult:
        """As `Sink` says; durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        try:
            # Unlike rename, this does not take the place of a file that has come since.
            os.link(self._part, self._path)
            self._part.unlink()
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            self._part.rename(self._path)  # a file system without links, as exFAT
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return ExportResult(
            path=self._path,
            archive_bytes=size,
            content_bytes=content_bytes,
            resumed_bytes=self._resumed,
        )

    def close(self) -> None:
        """As `Sink` says; what was received stays, for the next call to go on."""
        self._file.close()
        with suppress(FileNotFoundError):
            if not self._part.stat().st_size:
                self._part.unlink()


class _StreamSink:
    """A file that is open already; it stays open."""

    resume = None

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, 0

    def write(self, data: bytes) -> None:
        """As `Sink` says."""
        self._file.write(data)
        self._size += len(data)

    def finish(self, content_bytes: int) -> ExportResult:
        """As `Sink` says."""
        self._file.flush()
        return ExportResult(
            path=None, archive_bytes=self._size, content_bytes=content_bytes, resumed_bytes=0
        )

    def close(self) -> None:
        """As `Sink` says."""


def _received(file: BinaryIO, path: Path) -> _Received:
    """Tell how far an archive was received.

    :raise InvalidArgumentError: when the file begins like something else.
    """
    nothing = _Received(0, None)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(_PREAMBLE.size)
    if not _MAGIC.startswith(head[: len(_MAGIC)]):
        raise InvalidArgumentError(f"{path} is no part of an archive: remove it")
    if len(head) < _PREAMBLE.size:
        return nothing
    _, _, manifest_bytes, digest = _PREAMBLE.unpack(head)
    at = _PREAMBLE.size + manifest_bytes
    if at > size:
        return nothing
    resume = pb.ExportResume(manifest_sha256=digest, member=0, block=0)
    while at + _HEADER.size <= size:
        file.seek(at)
        mark, member, number, stored, _, _ = _HEADER.unpack(file.read(_HEADER.size))
        if mark not in (_BLOCK, _END) or at + _HEADER.size + stored > size:
            break  # cut off there; or the trailer, which is short and is sent again
        at += _HEADER.size + stored
        if mark == _BLOCK:
            resume.member, resume.block = member, number + 1
        else:
            resume.member, resume.block = member + 1, 0
    return _Received(at, resume)
