"""Connections into guests that a caller asks for: to what listens there, or to a session of sshd.

A session needs nothing that listens: ``sshd -i`` is run through the guest's channel for one
connection, with its configuration on the command line. Who may log in is said there too, so nothing
of it is kept in the guest. It has the guest's own host keys, which it tells through the channel: so
they are known by a way that is trusted, also after they were renewed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncssh

from stratabox.daemon.lifecycle.inside.carrying import (
    BROKEN,
    OPEN_SECONDS,
    PIECE,
    WINDOW,
    Far,
    lost,
)
from stratabox.daemon.lifecycle.inside.keys import HOST_KEY, bare
from stratabox.storage.model.errors import (
    DeniedError,
    FailedError,
    InvalidArgumentError,
    NoSpaceError,
)

MOST = 512
"""Connections that callers have open at once, of all guests together."""

_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\$?")
_HEAD_BYTES = 16 << 10
_HEAD_KEYS = 16
_STDERR_BYTES = 2 << 10
_SESSION_SECONDS = 60.0
_NO_SSHD = 127

# $1: user, $2...: options.
_SESSION = """\
user=$1
shift
for sshd in /usr/sbin/sshd /usr/local/sbin/sshd /usr/bin/sshd none; do
    if [ -x "$sshd" ]; then break; fi
done
if [ "$sshd" = none ]; then exit 127; fi
mkdir -p /run/sshd && chmod 755 /run/sshd
keys=
for file in /etc/ssh/ssh_host_ed25519_key /etc/ssh/ssh_host_ecdsa_key /etc/ssh/ssh_host_rsa_key; do
    if [ -s "$file" ] && [ -s "$file.pub" ]; then
        read -r key <"$file.pub"
        printf '%s\\n' "$key"
        keys="$keys -h $file"
    fi
done
if [ -z "$keys" ]; then
    printf 'channel\\n'
    keys='-h /run/stratabox/host_key'
fi
printf '\\n'
# Where the user has a locked password, only PAM lets a key in.
pam=no
while IFS=: read -r name password rest; do
    case $name:$password in "$user:"!*) pam=yes ;; esac
done 2>/dev/null </etc/shadow
exec "$sshd" -i -e -f /dev/null $keys -o UsePAM=$pam "$@"
"""

_OPTIONS = (
    "AuthenticationMethods=publickey",
    "AuthorizedKeysCommandUser=root",
    "PermitRootLogin=prohibit-password",
    "PidFile=none",
    "UseDNS=no",
    "PrintMotd=no",
    "PrintLastLog=no",
    "AcceptEnv=*",
    "MaxSessions=1024",
    "LogLevel=ERROR",
    "Subsystem=sftp internal-sftp",
)


class Dialing:
    """Counts the connections that callers have open."""

    def __init__(self) -> None:
        self._open = 0

    @asynccontextmanager
    async def one_more(self) -> AsyncIterator[None]:
        """Have a place for one connection.

        :raise NoSpaceError: TOO_MANY_CONNECTIONS.
        """
        if self._open >= MOST:
            raise NoSpaceError(
                f"{MOST} connections into guests are open: close some first",
                reason="TOO_MANY_CONNECTIONS",
                limit=MOST,
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1


@dataclass(frozen=True)
class Session:
    """A session of sshd that waits for its client."""

    far: Far
    host_keys: Sequence[str]


def user_from(name: str) -> str:
    """The user of a guest; none is root. :raise InvalidArgumentError: when it can be nobody."""
    if not name:
        return "root"
    if not _USER.fullmatch(name):
        raise InvalidArgumentError(f"{name!r} is no name of a user", field="user")
    return name


@asynccontextmanager
async def session(
    connection: asyncssh.SSHClientConnection,
    user: str,
    keys: Sequence[str],
    env: Sequence[tuple[str, str]] = (),
) -> AsyncIterator[Session]:
    """A session of sshd in the guest, for one client; ended with the context.

    :param keys: who may log in as that user: public keys that `keys.checked` has passed.
    :param env: of everything that is run by it.
    :raise DeniedError: NO_SSHD.
    :raise FailedError: SSHD_FAILED, with its last words.
    :raise UnavailableError: CONNECTION_LOST.
    """
    command = _command(user, keys, env)
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            process = await connection.create_process(command, encoding=None, window=WINDOW)
    except (*BROKEN, TimeoutError) as error:
        raise lost(error) from error
    words = _Words(process.stderr)
    async with Far(process.stdout, process.stdin) as far:
        try:
            host_keys, first = await _begin(connection, process, words)
            far.first = first
            yield Session(far, host_keys)
        finally:
            await words.close()


async def _begin(
    connection: asyncssh.SSHClientConnection,
    process: asyncssh.SSHClientProcess[bytes],
    words: _Words,
) -> tuple[list[str], bytes]:
    """What comes before a client is heard: the guest's host keys, and sshd's first words."""
    try:
        async with asyncio.timeout(_SESSION_SECONDS):
            head = await process.stdout.readuntil(b"\n\n")
            first = await process.stdout.read(PIECE)
            if not first.startswith(b"SSH-"):
                raise asyncio.IncompleteReadError(first, None)
    except asyncio.IncompleteReadError as error:
        raise await _failure(process, words) from error
    except (*BROKEN, TimeoutError) as error:
        raise lost(error) from error
    lines = head[:_HEAD_BYTES].decode("ascii", "replace").split("\n")
    if lines[0] == "channel" and (key := connection.get_server_host_key()):
        return [bare(key.export_public_key().decode())], first
    found = [bare(line) for line in lines[:_HEAD_KEYS]]
    return [line for line in found if HOST_KEY.fullmatch(line)], first


async def _failure(
    process: asyncssh.SSHClientProcess[bytes], words: _Words
) -> DeniedError | FailedError:
    async with asyncio.timeout(OPEN_SECONDS):
        await process.wait_closed()
    if process.exit_status == _NO_SSHD:
        return DeniedError("the guest has no sshd: install openssh-server in it", reason="NO_SSHD")
    return FailedError(
        f"the guest's sshd has failed: {words.text or process.exit_status}", reason="SSHD_FAILED"
    )


class _Words:
    """The last that a process says on stderr, which is always read."""

    def __init__(self, source: asyncssh.SSHReader[bytes]) -> None:
        self._last = b""
        self._reading = asyncio.create_task(self._read(source), name="words of sshd")

    @property
    def text(self) -> str:
        """It, on one line."""
        return " ".join(self._last.decode("utf-8", "replace").split())

    async def close(self) -> None:
        """Read no more."""
        self._reading.cancel()
        await asyncio.wait({self._reading})

    async def _read(self, source: asyncssh.SSHReader[bytes]) -> None:
        with contextlib.suppress(*BROKEN):
            while data := await source.read(_STDERR_BYTES):
                self._last = (self._last + data)[-_STDERR_BYTES:]


def _command(user: str, keys: Sequence[str], env: Sequence[tuple[str, str]]) -> str:
    options = [f"AllowUsers={user}", *_OPTIONS]
    if keys:
        # The guest's printf, with the keys for arguments: base64 holds nothing that is special.
        words = " ".join(f'"{bare(key)}"' for key in keys)
        options.append(f'AuthorizedKeysCommand=/usr/bin/printf "%%s\\n" {words}')
    if variables := [_variable(name, value) for name, value in env if _fits(name, value)]:
        options.append(f"SetEnv={' '.join(variables)}")
    arguments = [word for option in options for word in ("-o", option)]
    return shlex.join(["/bin/sh", "-c", _SESSION, "sh", user, *arguments])


def _fits(name: str, value: str) -> bool:
    """An option is one line, and a quote in it would end a value."""
    return not re.search(r"[\x00-\x1f\x7f\"\\]", name + value)


def _variable(name: str, value: str) -> str:
    return f'"{name}={value}"'
