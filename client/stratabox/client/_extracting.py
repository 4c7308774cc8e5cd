"""Puts the members of a tar into a folder of this host, and never anything elsewhere.

Every folder on the way is opened from the one above it and follows no link; a file that is there
is removed and made anew, never written through. So whatever names and links a tar has, and in
whatever order, only what lies below the target is touched. Devices are not made, and links that
lead out only where the caller said so.

The target is open, as the first of `_way`; those behind it are the folders down to the one that is
being filled.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stratabox.client._tar import Kind, Member, leads_out, split
from stratabox.client.errors import InvalidArchiveError
from stratabox.client.file_records import CopyResult

MOST_ENTRIES = 10_000_000
MOST_WARNINGS = 100
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass
class _Folder:
    name: bytes
    descriptor: int
    member: Member | None = None
    """What it is to be when all is in it."""


class Notes:
    """What is said of a copy in the end."""

    def __init__(self) -> None:
        self.entries = 0
        self.size = 0
        self.incomplete = False
        self._warnings: list[str] = []

    def warn(self, path: bytes, why: str) -> None:
        """Something is left out."""
        self.incomplete = True
        self.remark(f"{path.decode('utf-8', 'backslashreplace')}: {why}")

    def remark(self, text: str) -> None:
        """Something is to be known."""
        if len(self._warnings) < MOST_WARNINGS:
            self._warnings.append(text)

    def result(self) -> CopyResult:
        """All of it."""
        return CopyResult(
            entries=self.entries,
            size_bytes=self.size,
            warnings=tuple(self._warnings),
            incomplete=self.incomplete,
        )


class Extractor:
    """A sink (`_tar.Sink`) that makes files. Close it, whatever happens.

    :param target: An existing folder.
    :param fresh: The target was made for this: it gets the mode and time of what is copied.
    :param limit: Bytes of all files together at most.
    :param all_links: Make links that lead out of the target, too.
    :param progress: Called with bytes written so far, and 0.
    """

    def __init__(
        self,
        target: Path,
        notes: Notes,
        *,
        fresh: bool,
        limit: int,
        all_links: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._notes = notes
        self._fresh, self._limit, self._all_links = fresh, limit, all_links
        self._progress = progress
        self._promised = 0
        self._file: int | None = None
        self._current: Member | None = None
        self._at = 0
        root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._way = [_Folder(b"", root)]

    def member(self, member: Member) -> None:
        """As `Sink` says.

        :raise InvalidArchiveError: when it is more than may be.
        :raise OSError: when it cannot be made.
        """
        self._notes.entries += 1
        self._promised += member.size
        if self._notes.entries > MOST_ENTRIES:
            raise InvalidArchiveError(f"the guest sends more than {MOST_ENTRIES} files")
        if self._promised > self._limit:
            raise InvalidArchiveError(
                f"the guest sends {self._promised} bytes or more, and {self._limit} may come:"
                " that is the room at the target, or the limit that was given"
            )
        if not member.parts:
            if self._fresh and member.kind is Kind.DIRECTORY:
                self._way[0].member = member
            return
        match member.kind:
            case Kind.DIRECTORY:
                self._enter(member.parts)
                self._way[-1].member = member
            case Kind.FILE:
                self._begin(member, self._folder_of(member))
            case Kind.SYMLINK if leads_out(member) and not self._all_links:
                self._notes.warn(member.path, "left out: it is a link that leads out of the copy")
            case Kind.SYMLINK:
                folder = self._folder_of(member)
                _clear(member.parts[-1], folder)
                os.symlink(member.target, member.parts[-1], dir_fd=folder)
                os.utime(
                    member.parts[-1],
                    (member.modified, member.modified),
                    dir_fd=folder,
                    follow_symlinks=False,
                )
            case Kind.HARD_LINK:
                self._link(member)
            case Kind.OTHER:
                self._notes.warn(member.path, "left out: it is a device or a FIFO")

    def data(self, piece: bytes) -> None:
        """As `Sink` says. :raise OSError: when it cannot be written."""
        assert self._file is not None
        assert self._current is not None
        if piece.count(0) != len(piece):  # zeros are left out: holes take no room
            view = memoryview(piece)
            written = 0
            while written < len(piece):
                written += os.pwrite(self._file, view[written:], self._at + written)
        self._at += len(piece)
        self._notes.size += len(piece)
        if self._progress is not None:
            self._progress(self._notes.size, 0)
        if self._at == self._current.size:
            self._end_file()

    def end(self) -> None:
        """As `Sink` says."""
        while self._way:
            self._leave()

    def close(self) -> None:
        """Let go of everything; a file that is not whole is removed."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            if self._current is not None:
                with suppress(OSError):
                    os.unlink(self._current.parts[-1], dir_fd=self._way[-1].descriptor)
        while self._way:
            os.close(self._way.pop().descriptor)

    def _begin(self, member: Member, folder: int) -> None:
        _clear(member.parts[-1], folder)
        self._file = os.open(member.parts[-1], _NEW, 0o600, dir_fd=folder)
        self._current, self._at = member, 0
        if not member.size:
            self._end_file()

    def _end_file(self) -> None:
        assert self._file is not None
        assert self._current is not None
        os.ftruncate(self._file, self._current.size)
        _settle(self._file, self._current)
        os.close(self._file)
        self._file = self._current = None

    def _link(self, member: Member) -> None:
        source = split(member.target)
        if not source or source == member.parts:
            raise InvalidArchiveError("the guest sends a hard link to itself, or to a folder")
        opened: list[int] = []
        try:
            at = self._way[0].descriptor
            for part in source[:-1]:
                at = os.open(part, _FOLDER, dir_fd=at)
                opened.append(at)
            found = os.stat(source[-1], dir_fd=at, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                self._notes.warn(member.path, "left out: it is a hard link to no file")
                return
            folder = self._folder_of(member)
            _clear(member.parts[-1], folder)
            os.link(
                source[-1],
                member.parts[-1],
                src_dir_fd=at,
                dst_dir_fd=folder,
                follow_symlinks=False,
            )
        except FileNotFoundError:
            self._notes.warn(member.path, "left out: what it is a hard link to was not copied")
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _folder_of(self, member: Member) -> int:
        self._enter(member.parts[:-1])
        return self._way[-1].descriptor

    def _enter(self, parts: tuple[bytes, ...]) -> None:
        """Go to a folder, which is made where it is not there."""
        same = 0
        while (
            same < len(parts)
            and same + 1 < len(self._way)
            and self._way[same + 1].name == parts[same]
        ):
            same += 1
        while len(self._way) > same + 1:
            self._leave()
        for part in parts[same:]:
            above = self._way[-1].descriptor
            with suppress(FileExistsError):
                os.mkdir(part, 0o700, dir_fd=above)
            self._way.append(_Folder(part, os.open(part, _FOLDER, dir_fd=above)))

    def _leave(self) -> None:
        """All that was to come is in the innermost folder."""
        folder = self._way.pop()
        try:
            if folder.member is not None:
                _settle(folder.descriptor, folder.member)
        finally:
            os.close(folder.descriptor)


def _clear(name: bytes, folder: int) -> None:
    """Remove what is in the way. :raise OSError: when that is a directory."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _settle(descriptor: int, member: Member) -> None:
    # Whoever ran it there, nothing runs here as somebody else.
    os.fchmod(descriptor, member.mode & 0o777)
    os.utime(descriptor, (member.modified, member.modified))
