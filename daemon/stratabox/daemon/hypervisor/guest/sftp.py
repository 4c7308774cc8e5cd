"""SFTP with a guest, over its SSH connection.

One session is kept for each connection, as its own user; others are begun for each use. It is only
asked for what is small: names and attributes. Paths are bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import asyncssh
from asyncssh.constants import OPEN_REQUEST_SESSION_FAILED
from asyncssh.sftp import start_sftp_client

from stratabox.daemon.hypervisor.guest.channel import has_ended
from stratabox.daemon.hypervisor.guest.pipe import LOST, line
from stratabox.storage.model.errors import DeniedError, NotFoundError, UnavailableError

T = TypeVar("T")

SECONDS = 30.0
"""How long a guest may take for an answer."""

# Where distributions have it. One that is built into sshd serves the connection's own user only.
_SERVER = """
for file in /usr/lib/openssh/sftp-server /usr/libexec/openssh/sftp-server /usr/lib/ssh/sftp-server \
  /usr/libexec/sftp-server /usr/lib/sftp-server; do
  [ ! -x "$file" ] || exec "$file"
done
exit 127
"""

_kept: WeakKeyDictionary[asyncssh.SSHClientConnection, asyncssh.SFTPClient] = WeakKeyDictionary()
_turns: WeakKeyDictionary[asyncssh.SSHClientConnection, asyncio.Lock] = WeakKeyDictionary()


async def timely(answer: Awaitable[T]) -> T:
    """Wait for an answer. :raise UnavailableError: CHANNEL_UNAVAILABLE, when it takes too long."""
    try:
        async with asyncio.timeout(SECONDS):
            return await answer
    except TimeoutError:
        raise UnavailableError(
            f"the guest did not answer within {SECONDS:g} s", reason=LOST
        ) from None


@asynccontextmanager
async def client(
    connection: asyncssh.SSHClientConnection, user: str = ""
) -> AsyncIterator[asyncssh.SFTPClient]:
    """A session.

    :param user: as whom; empty: who the connection is.
    :raise DeniedError: GUEST_TOOL_MISSING, when the guest has no SFTP server.
    :raise NotFoundError: USER_NOT_FOUND.
    :raise UnavailableError: CHANNEL_UNAVAILABLE.
    """
    if user and user != "root":
        own = await _begin(connection, user)
        try:
            yield own
        finally:
            own.exit()
        return
    async with _turns.setdefault(connection, asyncio.Lock()):
        session = _kept.get(connection)
        if session is None:
            session = _kept[connection] = await _begin(connection, "")
    try:
        yield session
    except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection):
        _forget(connection, session)
        raise
    except Exception as error:
        if isinstance(error.__cause__, (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection)):
            _forget(connection, session)
        raise


def _forget(connection: asyncssh.SSHClientConnection, session: asyncssh.SFTPClient) -> None:
    if _kept.get(connection) is session:
        del _kept[connection]


async def entries(
    session: asyncssh.SFTPClient, path: bytes
) -> AsyncGenerator[tuple[bytes, asyncssh.SFTPAttrs], None]:
    """The names in a directory, and what they are; read as they are asked for.

    :raise asyncssh.SFTPError: when it cannot be listed.
    """
    names = session.scandir(path)
    try:
        while True:
            entry = await timely(anext(names, None))
            if entry is None:
                return
            yield bytes(entry.filename), entry.attrs  # type: ignore[arg-type]  # bytes, as the path
    finally:
        await names.aclose()  # type: ignore[attr-defined]  # it is a generator


async def _begin(connection: asyncssh.SSHClientConnection, user: str) -> asyncssh.SFTPClient:
    try:
        async with asyncio.timeout(SECONDS):
            if not user:
                return await connection.start_sftp_client()
            command = line(_SERVER, user=user)
            writer, reader, words = await connection.open_session(
                command,
                encoding=None,
            )
            try:
                return await start_sftp_client(
                    connection, asyncio.get_running_loop(), "replace",
                    reader, writer, "utf-8", "strict", 3,
                )  # fmt: skip
            except (asyncssh.SFTPError, EOFError) as error:
                if await has_ended(connection):
                    raise _lost(error) from error
                said = await words.read(1 << 10)
                raise _refusal(said, user) from error
    except TimeoutError:
        raise UnavailableError(
            f"the guest began no SFTP session within {SECONDS:g} s", reason=LOST
        ) from None
    except asyncssh.ChannelOpenError as error:
        # A guest that has as many sessions as it allows refuses the channel, not what runs in it.
        if error.code != OPEN_REQUEST_SESSION_FAILED or await has_ended(connection):
            raise _lost(error) from error
        raise _no_server() from error
    except asyncssh.SFTPError as error:
        if await has_ended(connection):
            raise _lost(error) from error
        raise _no_server() from error
    except (OSError, asyncssh.Error) as error:
        raise _lost(error) from error


def _lost(error: Exception) -> UnavailableError:
    return UnavailableError(f"the guest began no SFTP session: {error}", reason=LOST)


def _refusal(said: bytes, user: str) -> NotFoundError | DeniedError:
    if b"does not exist" in said or b"unknown user" in said:
        return NotFoundError(f"the guest has no user {user}", reason="USER_NOT_FOUND", user=user)
    return _no_server()


def _no_server() -> DeniedError:
    return DeniedError(
        "the guest has no SFTP server: install openssh-sftp-server there",
        reason="GUEST_TOOL_MISSING",
    )
