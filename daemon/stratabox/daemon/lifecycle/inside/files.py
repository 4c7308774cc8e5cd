"""Files in guests: looked at, read, written, changed.

| module | duty |
|---|---|
| `files` | the use cases |
| `file_scripts` | what is done in the guest, as scripts of its shell. Pure |
| `file_errors` | what the guest says, as our errors. Pure |
| `file_records` | what is said of files; what may be asked for. Pure |
| `file_watch` | changes, as the guest's inotify tells them, or by looking again and again |

Whatever changes or carries bytes is a command over the guest's channel: that is faster than SFTP,
says why it failed, and can be done as any user. What only looks at names is SFTP's.
"""

from __future__ import annotations

import secrets
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import asyncssh

from stratabox.daemon.hypervisor.guest import sftp
from stratabox.daemon.hypervisor.guest.pipe import LOST, Ended, Pipe, line, running
from stratabox.daemon.lifecycle.inside import file_scripts as scripts
from stratabox.daemon.lifecycle.inside.file_errors import denied, failed, failure, gone, printable
from stratabox.daemon.lifecycle.inside.file_records import (
    NO_WISH,
    FileInfo,
    New,
    Packed,
    WriteMode,
    check_mode,
    check_owner,
    check_path,
    check_removable,
    parse_stat,
)
from stratabox.daemon.lifecycle.policy import require_state
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.storage.model.errors import (
    DeniedError,
    InvalidArgumentError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.states import SandboxState

PAGE = 256
"""Entries of a directory that are told at once."""
WARNINGS = 20
_WARNING_CHARACTERS = 500
_LINE = 200
_SLICE = 64 << 10
_LARGEST_NAME = 1024


class Files:
    """The use cases. All raise NotFoundError SANDBOX_NOT_FOUND, USER_NOT_FOUND; DeniedError
    INVALID_STATE, when it does not run, and NO_SSHD; UnavailableError CHANNEL_UNAVAILABLE, when the
    guest does not answer; InvalidArgumentError for paths that cannot be; and for a file what
    `file_errors` knows.
    """

    def __init__(self, guests: Guests) -> None:
        self._guests = guests

    async def stat(self, sandbox: str, path: bytes, *, user: str, follow: bool) -> FileInfo:
        """Tell of one file."""
        check_path(path)
        connection = await self.connection(sandbox)
        async with sftp.client(connection, user) as client:
            ask = client.stat if follow else client.lstat
            try:
                attributes = await sftp.timely(ask(path))
            except asyncssh.SFTPError as error:
                raise _sftp_failure(error, path) from error
        return _of_attributes(path, attributes)

    async def list(
        self, sandbox: str, path: bytes, *, user: str
    ) -> AsyncGenerator[list[FileInfo], None]:
        """The entries of a directory, in pages."""
        check_path(path)
        connection = await self.connection(sandbox)
        async with sftp.client(connection, user) as client:
            page: list[FileInfo] = []
            try:
                async with aclosing(sftp.entries(client, path)) as entries:
                    async for name, attributes in entries:
                        if not _is_name(name):
                            continue
                        page.append(_of_attributes(name, attributes))
                        if len(page) == PAGE:
                            yield page
                            page = []
            except asyncssh.SFTPError as error:
                raise await _list_failure(client, error, path) from error
            if page:
                yield page

    async def read_link(self, sandbox: str, path: bytes, *, user: str) -> bytes:
        """Where a link leads to."""
        check_path(path)
        connection = await self.connection(sandbox)
        async with sftp.client(connection, user) as client:
            try:
                return bytes(await sftp.timely(client.readlink(path)))
            except asyncssh.SFTPError as error:
                known = _sftp_failure(error, path)
                if known.reason != "FILE_FAILED":
                    raise known from error
                raise failed(path, "it is no symbolic link") from error

    async def read(
        self, sandbox: str, path: bytes, *, user: str, offset: int, length: int | None
    ) -> AsyncGenerator[FileInfo | bytes, None]:
        """The file that is read, then its bytes."""
        check_path(path)
        limit = b"" if length is None else b"%d" % length
        command = line(scripts.READ, path, b"%d" % offset, limit, user=user)
        async with running(await self.connection(sandbox), command) as pipe:
            info = parse_stat(await pipe.read_line(_LINE), path)
            if info is None:
                raise failure(await pipe.ended(), path)
            yield info
            while data := await pipe.read():
                yield data
            ended = await pipe.ended()
            if ended.status != 0:
                raise failure(ended, path)

    async def write(
        self,
        sandbox: str,
        path: bytes,
        pieces: AsyncIterator[bytes],
        *,
        user: str,
        how: WriteMode,
        mode: int | None,
        modified: int | None,
        parents: bool,
        new: New = NO_WISH,
        sync: bool = False,
    ) -> FileInfo:
        """Write a file. When `pieces` raises, or this is cancelled, nothing comes of it, or in
        place what came so far.

        :param new: of a file that was not there; `mode` goes before.
        :param sync: it is on the guest's disk when this returns.
        """
        mark = secrets.token_hex(scripts.MARK_BYTES // 2).encode()
        time = b"" if modified is None else b"%d" % modified
        words = (check_path(path), how.encode(), check_mode(mode), time, _flag(parents), mark)
        its_own = (new.owner.encode(), check_mode(new.mode))
        command = line(scripts.WRITE, *words, *its_own, _flag(sync), user=user)
        async with running(await self.connection(sandbox), command) as pipe:
            took = await _feed(pipe, pieces)
            if took and how.is_aside:
                took = await pipe.write(mark)
            pipe.end_input()
            info = await _told(pipe, path)
            if not took:
                raise failed(path, "it did not take all")
            return info

    async def make_directory(
        self,
        sandbox: str,
        path: bytes,
        *,
        user: str,
        parents: bool,
        mode: int | None,
        owner: str = "",
    ) -> FileInfo:
        """Make a directory.

        :param owner: of all that is made, as user:group; empty: who makes it.
        """
        words = (check_path(path), check_mode(mode), _flag(parents), owner.encode())
        return await self._change(sandbox, path, user, scripts.MAKE_DIRECTORY, *words)

    async def remove(
        self, sandbox: str, path: bytes, *, user: str, recursive: bool, count: bool = False
    ) -> int:
        """Remove a file, an empty directory, or with all that is in it.

        :return: how many files and directories there were, with `count`; else 1.
        """
        words = (check_removable(path), _flag(recursive), _flag(count))
        command = line(scripts.REMOVE, *words, user=user)
        async with running(await self.connection(sandbox), command) as pipe:
            pipe.end_input()
            said = await pipe.read_line(_LINE)
            ended = await pipe.ended()
        if ended.status != 0:
            raise failure(ended, path)
        return int(said) if said.strip().isdigit() else 1

    async def move(
        self, sandbox: str, source: bytes, target: bytes, *, user: str, keep: bool
    ) -> FileInfo:
        """Give a file another path."""
        words = (check_path(source, "source"), check_path(target, "target"), _flag(keep))
        command = line(scripts.MOVE, *words, user=user)
        async with running(await self.connection(sandbox), command) as pipe:
            pipe.end_input()
            info = parse_stat(await pipe.read_line(_LINE), target)
            ended = await pipe.ended()
        if info is None or ended.status != 0:
            raise failure(ended, source if ended.status == scripts.NO_SOURCE else target)
        return info

    async def change(
        self,
        sandbox: str,
        path: bytes,
        *,
        user: str,
        mode: int | None,
        owner: str,
        group: str,
        recursive: bool,
    ) -> FileInfo:
        """Change mode or owner."""
        words = (check_path(path), check_mode(mode), check_owner(owner, group), _flag(recursive))
        return await self._change(sandbox, path, user, scripts.CHANGE, *words)

    async def make_symlink(
        self, sandbox: str, path: bytes, target: bytes, *, user: str
    ) -> FileInfo:
        """Make a symbolic link."""
        if not target or b"\0" in target or len(target) > 4095:
            raise InvalidArgumentError("a link cannot lead there", field="target")
        return await self._change(sandbox, path, user, scripts.SYMLINK, check_path(path), target)

    async def pack(
        self, sandbox: str, path: bytes, *, user: str
    ) -> AsyncGenerator[bytes | Packed, None]:
        """A directory as a tar, and last how that ended."""
        command = line(scripts.PACK, check_path(path), user=user)
        async with running(await self.connection(sandbox), command) as pipe:
            pipe.end_input()
            some = False
            while data := await pipe.read():
                some = True
                yield data
            ended = await pipe.ended()
            # tar says 1 or 2 when it has left something out, and has packed the rest all the same.
            if not some or ended.status not in (0, 1, 2):
                raise failure(ended, path)
            yield Packed(warnings=_warnings(ended), incomplete=ended.status != 0)

    async def unpack(
        self, sandbox: str, path: bytes, pieces: AsyncIterator[bytes], *, user: str
    ) -> tuple[str, ...]:
        """Unpack a tar in a directory, and return what the guest's tar remarked."""
        command = line(scripts.UNPACK, check_path(path), user=user)
        async with running(await self.connection(sandbox), command) as pipe:
            # It may take no more than the end of the archive: what follows that does not matter.
            await _feed(pipe, pieces)
            pipe.end_input()
            ended = await pipe.ended()
        if ended.status != 0:
            raise failure(ended, path, told=True)
        return _warnings(ended)

    async def connection(self, sandbox: str) -> asyncssh.SSHClientConnection:
        """The channel into a sandbox's guest."""
        guest, record = await self._guests.find(sandbox)
        require_state(record, SandboxState.RUNNING, action="use files of")
        return await guest.connection()

    async def _change(
        self, sandbox: str, path: bytes, user: str, script: str, *words: bytes
    ) -> FileInfo:
        command = line(script, *words, user=user)
        async with running(await self.connection(sandbox), command) as pipe:
            pipe.end_input()
            return await _told(pipe, path)


async def _feed(pipe: Pipe, pieces: AsyncIterator[bytes]) -> bool:
    """Send all bytes; False: it ended before."""
    async for piece in pieces:
        for at in range(0, len(piece), _SLICE):
            if not await pipe.write(piece[at : at + _SLICE]):
                return False
    return True


async def _told(pipe: Pipe, path: bytes) -> FileInfo:
    """What a script tells of the file that it has changed."""
    info = parse_stat(await pipe.read_line(_LINE), path)
    ended = await pipe.ended()
    if ended.status == scripts.BROKEN_OFF:
        raise UnavailableError(
            f"{printable(path)}: not all of it arrived in the guest", reason=LOST
        )
    if ended.status != 0 or info is None:
        raise failure(ended, path)
    return info


def _flag(value: bool) -> bytes:
    return b"1" if value else b""


def _warnings(ended: Ended) -> tuple[str, ...]:
    lines = ended.words.decode(errors="replace").splitlines()
    return tuple(each[:_WARNING_CHARACTERS] for each in lines[:WARNINGS])


def _is_name(name: bytes) -> bool:
    """What a directory can hold; a guest may say anything."""
    return 0 < len(name) <= _LARGEST_NAME and not {*b"/\0"} & {*name} and name not in (b".", b"..")


def _of_attributes(path: bytes, attributes: asyncssh.SFTPAttrs) -> FileInfo:
    return FileInfo(
        path=path,
        mode=(attributes.permissions or 0) & 0xFFFF,
        size=(attributes.size or 0) & (1 << 64) - 1,
        uid=(attributes.uid or 0) & 0xFFFFFFFF,
        gid=(attributes.gid or 0) & 0xFFFFFFFF,
        modified=int(attributes.mtime or 0) & 0xFFFFFFFF,
    )


def _sftp_failure(error: asyncssh.SFTPError, path: bytes) -> StrataboxError:
    """SFTP's few kinds of failure. It says "no such file" of what lies below a file, too."""
    match error:
        case asyncssh.SFTPNoSuchFile() | asyncssh.SFTPNoSuchPath():
            return gone(path)
        case asyncssh.SFTPPermissionDenied():
            return denied(path)
        case asyncssh.SFTPConnectionLost() | asyncssh.SFTPNoConnection():
            return UnavailableError("the guest's SFTP server ended", reason=LOST)
    return failed(path, str(error.reason)[:200] or type(error).__name__)


async def _list_failure(
    client: asyncssh.SFTPClient, error: asyncssh.SFTPError, path: bytes
) -> StrataboxError:
    known = _sftp_failure(error, path)
    if known.reason != "FILE_NOT_FOUND":
        return known
    try:
        attributes = await sftp.timely(client.stat(path))
    except asyncssh.SFTPError:
        return known
    if stat.S_ISDIR(attributes.permissions or 0):
        return known
    return DeniedError(
        f"{printable(path)}: it is not a directory",
        reason="NOT_A_DIRECTORY", path=printable(path),
    )  # fmt: skip
