"""Changes of files in guests.

A small program (watch.c) is brought into the guest and tells what its kernel's inotify tells; where
none may run, or the guest's processor is another, the directory is looked at every second, by SFTP.
"""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import asyncssh

from stratabox.daemon.hypervisor.guest import pipe as pipes
from stratabox.daemon.hypervisor.guest import sftp
from stratabox.daemon.hypervisor.guest.pipe import LOST, Pipe, line, running
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.inside import file_scripts as scripts
from stratabox.daemon.lifecycle.inside.file_errors import failure, gone
from stratabox.daemon.lifecycle.inside.file_records import check_path
from stratabox.daemon.lifecycle.inside.files import Files
from stratabox.storage.model.errors import StrataboxError, UnavailableError

PROGRAM = Path(pipes.__file__).with_name("watch.1")
"""Not there where the package was built without a C compiler."""
MOST_POLLED = 20_000
"""Entries that are looked at every second."""
EVERY = 1.0

_NOT_TO_BE_HAD = 126
_LONGEST_RECORD = 16 << 10


class Method(StrEnum):
    """How changes are noticed."""

    INOTIFY = "inotify"
    POLLING = "polling"


class ChangeType(StrEnum):
    """What has happened to a file."""

    CREATED = "created"
    CHANGED = "changed"
    REMOVED = "removed"
    MOVED = "moved"
    OVERFLOW = "overflow"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change."""

    type: ChangeType
    path: bytes = b""
    old_path: bytes = b""
    directory: bool = False


_LETTERS = {
    b"C": ChangeType.CREATED,
    b"W": ChangeType.CHANGED,
    b"D": ChangeType.REMOVED,
    b"M": ChangeType.MOVED,
    b"O": ChangeType.OVERFLOW,
}


class _NoInotifyError(Exception):
    """The program cannot run there."""


class Watches:
    """Follows changes. Raises what `Files` does."""

    def __init__(self, files: Files) -> None:
        self._files = files

    async def follow(
        self, sandbox: str, path: bytes, *, user: str, recursive: bool
    ) -> AsyncGenerator[Method | Change, None]:
        """How changes are noticed, once the watch stands; then each. Ends when what is watched is
        gone.
        """
        check_path(path)
        connection = await self._files.connection(sandbox)
        kind, real = await _kind(connection, path, user)
        where = _Where(path.rstrip(b"/"), real, is_folder=kind == b"d", recursive=recursive)
        program = await in_thread(_program)
        if program:
            told = _inotify(connection, program, where, user)
            try:
                async with aclosing(told):
                    async for one in told:
                        yield one
                return
            except _NoInotifyError:
                pass
        polled = _poll(connection, where, user)
        async with aclosing(polled):
            async for other in polled:
                yield other


@dataclass(frozen=True)
class _Where:
    asked: bytes
    """As the caller calls it, without a slash at its end."""
    real: bytes
    is_folder: bool
    recursive: bool

    @property
    def folder(self) -> bytes:
        """What is watched in truth: of a file, what it lies in, for files are replaced."""
        if self.is_folder:
            return self.real
        return self.real.rpartition(b"/")[0] or b"/"

    @property
    def only(self) -> bytes:
        """The one entry of it; none: all."""
        return b"" if self.is_folder else self.real.rpartition(b"/")[2]

    def named(self, relative: bytes) -> bytes:
        """A path as the caller would call it."""
        if not self.is_folder or not relative:
            return self.asked or b"/"
        return self.asked + b"/" + relative


def _program() -> bytes:
    try:
        return PROGRAM.read_bytes()
    except FileNotFoundError:
        return b""


async def _kind(
    connection: asyncssh.SSHClientConnection, path: bytes, user: str
) -> tuple[bytes, bytes]:
    async with running(connection, line(scripts.KIND, path, user=user)) as pipe:
        pipe.end_input()
        told = b""
        while (data := await pipe.read()) and len(told) <= _LONGEST_RECORD:
            told += data
        ended = await pipe.ended()
    if ended.status != 0 or told[:1] not in (b"d", b"f") or told[1:2] != b"/":
        raise failure(ended, path)
    return told[:1], told[1 : _LONGEST_RECORD + 1]


async def _inotify(
    connection: asyncssh.SSHClientConnection, program: bytes, where: _Where, user: str
) -> AsyncGenerator[Method | Change, None]:
    options = [b"-f", where.only] if where.only else [b"-r"] if where.recursive else []
    words = (b"%d" % len(program), where.folder, *options)
    async with running(connection, line(scripts.WATCH, *words, user=user)) as pipe:
        await pipe.write(program)
        async with aclosing(_records(pipe)) as records:
            if await anext(records, None) is None:
                ended = await pipe.ended()
                if ended.status == _NOT_TO_BE_HAD:
                    raise _NoInotifyError
                raise failure(ended, where.asked or b"/")
            yield Method.INOTIFY
            async for head, first, second in records:
                change = _change(where, head, first, second)
                yield change
                if change.type is ChangeType.REMOVED and where.is_folder and not first:
                    return
        # It goes on for as long as its input is open: something else has ended it.
        await pipe.ended()
        raise UnavailableError("the watch was ended in the guest", reason=LOST)


async def _records(pipe: Pipe) -> AsyncGenerator[tuple[bytes, bytes, bytes], None]:
    """What the program tells, in pieces: two letters, a path, the new path where it moved."""
    held = b""
    pending: bytes | None = None
    while data := await pipe.read():
        held += data
        *whole, held = held.split(b"\0")
        if len(held) > _LONGEST_RECORD:
            raise UnavailableError("the guest's watch makes no sense", reason=LOST)
        for field in whole:
            if pending is not None:
                yield pending[:2], pending[2:], field
                pending = None
            elif field[:1] == b"M":
                pending = field
            else:
                yield field[:2], field[2:], b""


def _change(where: _Where, head: bytes, first: bytes, second: bytes) -> Change:
    kind = _LETTERS.get(head[:1])
    if kind is None:
        raise UnavailableError("the guest's watch makes no sense", reason=LOST)
    directory = head[1:] == b"d"
    match kind:
        case ChangeType.OVERFLOW:
            return Change(type=kind)
        case ChangeType.MOVED:
            return Change(
                type=kind,
                path=where.named(second),
                old_path=where.named(first),
                directory=directory,
            )
    return Change(type=kind, path=where.named(first), directory=directory)


# Looking again and again

_Seen = Mapping[bytes, tuple[int, ...]]


async def _poll(
    connection: asyncssh.SSHClientConnection, where: _Where, user: str
) -> AsyncGenerator[Method | Change, None]:
    async with sftp.client(connection, user) as client:
        before, whole = await _look(client, where)
        if b"" not in before:
            raise gone(where.asked)
        yield Method.POLLING
        if not whole:
            yield Change(type=ChangeType.OVERFLOW)
        while True:
            await asyncio.sleep(EVERY)
            now, still_whole = await _look(client, where)
            for change in differences(before, now):
                yield Change(
                    type=change.type, path=where.named(change.path), directory=change.directory
                )
            if whole and not still_whole:
                yield Change(type=ChangeType.OVERFLOW)
            if where.is_folder and b"" not in now:
                return
            before, whole = now, still_whole


async def _look(client: asyncssh.SFTPClient, where: _Where) -> tuple[_Seen, bool]:
    """What is there, by its path below what is watched; and whether that is all."""
    seen: dict[bytes, tuple[int, ...]] = {}
    try:
        seen[b""] = _looks(await sftp.timely(client.stat(where.real)))
    except asyncssh.SFTPError as error:
        _require_living(error)
        return seen, True
    folders = [b""] if where.is_folder else []
    while folders:
        folder = folders.pop()
        try:
            async with aclosing(_entries(client, where, folder)) as entries:
                async for name, attributes in entries:
                    path = folder + b"/" + name if folder else name
                    if len(seen) >= MOST_POLLED:
                        return seen, False
                    seen[path] = _looks(attributes)
                    if where.recursive and stat.S_ISDIR(attributes.permissions or 0):
                        folders.append(path)
        except asyncssh.SFTPError as error:  # it went meanwhile, or may not be read
            _require_living(error)
    return seen, True


def _entries(
    client: asyncssh.SFTPClient, where: _Where, folder: bytes
) -> AsyncGenerator[tuple[bytes, asyncssh.SFTPAttrs], None]:
    async def entries() -> AsyncIterator[tuple[bytes, asyncssh.SFTPAttrs]]:
        async with aclosing(sftp.entries(client, where.real + b"/" + folder)) as found:
            async for name, attributes in found:
                if name not in (b".", b"..") and b"/" not in name and b"\0" not in name:
                    yield name, attributes

    return entries()  # type: ignore[return-value]  # it is a generator


def _require_living(error: asyncssh.SFTPError) -> None:
    if isinstance(error, (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection)):
        lost: StrataboxError = UnavailableError("the guest's SFTP server ended", reason=LOST)
        raise lost from error


def _looks(attributes: asyncssh.SFTPAttrs) -> tuple[int, ...]:
    mode = attributes.permissions or 0
    # A directory's own time and size change with each entry, which is told itself.
    size, time = (0, 0) if stat.S_ISDIR(mode) else (attributes.size or 0, attributes.mtime or 0)
    return mode, attributes.uid or 0, attributes.gid or 0, int(size), int(time)


def differences(before: _Seen, now: _Seen) -> list[Change]:
    """What has changed between two looks: what is gone first, the deepest before what it was in."""
    changes = []
    for path in sorted(before.keys() - now.keys(), reverse=True):
        changes.append(_as_change(ChangeType.REMOVED, path, before[path]))
    for path in sorted(now):
        old = before.get(path)
        if old is None:
            changes.append(_as_change(ChangeType.CREATED, path, now[path]))
        elif stat.S_IFMT(old[0]) != stat.S_IFMT(now[path][0]):
            changes.append(_as_change(ChangeType.REMOVED, path, old))
            changes.append(_as_change(ChangeType.CREATED, path, now[path]))
        elif old != now[path]:
            changes.append(_as_change(ChangeType.CHANGED, path, now[path]))
    return changes


def _as_change(kind: ChangeType, path: bytes, seen: tuple[int, ...]) -> Change:
    return Change(type=kind, path=path, directory=stat.S_ISDIR(seen[0]))
