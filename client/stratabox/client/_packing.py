"""Makes a tar of a folder of this host, piece by piece, for a guest."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from stratabox.client._extracting import Notes
from stratabox.client._file_requests import CHUNK
from stratabox.client._tar import BLOCK, END, Kind, Member, opened, pack_header


def pack(
    folder: Path,
    notes: Notes,
    *,
    itself: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[bytes]:
    """The folder and all that is in it, as a tar in pieces. Links are packed as links.

    A folder comes twice, before what is in it and behind: busybox's tar sets its time at once.

    :param notes: Counts what is packed, and is told what is left out.
    :param itself: With the folder's own mode and time.
    :raise OSError: when something cannot be read.
    """
    held = bytearray()
    for piece in _pieces(folder, notes, itself, progress):
        held += piece
        if len(held) >= CHUNK:
            yield bytes(held)
            held.clear()
    yield bytes(held + END)


def _pieces(
    folder: Path, notes: Notes, itself: bool, progress: Callable[[int, int], None] | None
) -> Iterator[bytes]:
    top = _member(Kind.DIRECTORY, (), folder.stat())
    if itself:
        yield pack_header(opened(top))
    # What is to be looked through; and, behind what is in it, what was.
    waiting: list[Member | tuple[bytes, ...]] = [top, ()] if itself else [()]
    while waiting:
        parts = waiting.pop()
        if isinstance(parts, Member):
            yield pack_header(parts)
            continue
        below: list[Member | tuple[bytes, ...]] = []
        with os.scandir(b"/".join((os.fsencode(folder), *parts))) as entries:
            found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        for entry in found:
            its = (*parts, entry.name)
            about = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(about.st_mode):
                member = _member(Kind.DIRECTORY, its, about)
                yield pack_header(opened(member))
                below += [member, its]
            elif stat.S_ISLNK(about.st_mode):
                target = os.readlink(entry.path)  # noqa: PTH115 (bytes)
                yield pack_header(_member(Kind.SYMLINK, its, about, target))
            elif stat.S_ISREG(about.st_mode):
                yield from _file(entry.path, its, notes, progress)
            else:
                notes.warn(b"/".join(its), "left out: it is a device, a FIFO or a socket")
                continue
            notes.entries += 1
        waiting += below


def _file(
    path: bytes,
    parts: tuple[bytes, ...],
    notes: Notes,
    progress: Callable[[int, int], None] | None,
) -> Iterator[bytes]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        about = os.fstat(descriptor)
        left = about.st_size
        yield pack_header(_member(Kind.FILE, parts, about))
        while left:
            piece = file.read(min(left, CHUNK)) or b""
            if not piece:  # it has become shorter: its size has been told already
                notes.warn(b"/".join(parts), "it became shorter while it was read")
                piece = bytes(min(left, CHUNK))
            left -= len(piece)
            yield piece
            notes.size += len(piece)
            if progress is not None:
                progress(notes.size, 0)
    yield bytes(-about.st_size % BLOCK)


def _member(
    kind: Kind, parts: tuple[bytes, ...], about: os.stat_result, target: bytes = b""
) -> Member:
    return Member(
        kind=kind,
        parts=parts,
        size=about.st_size if kind is Kind.FILE else 0,
        mode=about.st_mode & 0o7777,
        modified=max(int(about.st_mtime), 0),
        target=target,
    )
