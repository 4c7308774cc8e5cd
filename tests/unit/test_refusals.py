"""What a guest's sshd refuses is told from what it can't answer any more: by a real SSH server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncssh
import pytest

from stratabox.daemon.hypervisor.guest import sftp
from stratabox.daemon.lifecycle.inside.carrying import reach
from stratabox.storage.model.errors import (
    DeniedError,
    FailedError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.ports import Endpoint

KEY = asyncssh.generate_private_key("ssh-ed25519")


class Session(asyncssh.SSHServerSession[bytes]):
    """Without subsystems. :param cut: the connection ends as one is asked for."""

    def __init__(self, cut: asyncssh.SSHServerConnection | None) -> None:
        self._cut = cut

    def subsystem_requested(self, subsystem: str) -> bool:
        """As asyncssh says."""
        if self._cut is not None:
            self._cut.abort()
        return False


class Server(asyncssh.SSHServer):
    """Refuses, or ends, at a step: "open", "subsystem" or "connect"."""

    def __init__(self, step: str, *, cut: bool) -> None:
        self._step = step
        self._cut = cut
        self._connection: asyncssh.SSHServerConnection | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        """As asyncssh says."""
        self._connection = conn

    def begin_auth(self, username: str) -> bool:
        """As asyncssh says: nobody is asked who they are."""
        return False

    def session_requested(self) -> Session | bool:
        """As asyncssh says."""
        if self._step != "open":
            return Session(self._connection if self._cut else None)
        self._end()
        return False

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> bool:
        """As asyncssh says."""
        self._end()
        return False

    def unix_connection_requested(self, dest_path: str) -> bool:
        """As asyncssh says."""
        self._end()
        return False

    def _end(self) -> None:
        assert self._connection is not None
        if self._cut:
            self._connection.abort()


@asynccontextmanager
async def connected(step: str, *, cut: bool) -> AsyncIterator[asyncssh.SSHClientConnection]:
    async with (
        asyncssh.listen(
            "127.0.0.1", 0, config=None, server_host_keys=[KEY],
            server_factory=lambda: Server(step, cut=cut),
        ) as server,
        asyncssh.connect(
            "127.0.0.1", server.get_port(), config=None, known_hosts=None, username="root",
            client_keys=None, agent_path=None,
        ) as connection,
    ):  # fmt: skip
        yield connection


async def failure_of_a_session(step: str, *, cut: bool) -> StrataboxError:
    async with connected(step, cut=cut) as connection:
        with pytest.raises(StrataboxError) as raised:
            async with sftp.client(connection):
                pass
    return raised.value


async def test_a_guest_without_an_sftp_server_is_told_what_it_lacks() -> None:
    error = await failure_of_a_session("subsystem", cut=False)
    assert isinstance(error, DeniedError)
    assert error.reason == "GUEST_TOOL_MISSING"


@pytest.mark.parametrize(("step", "cut"), [("open", False), ("open", True), ("subsystem", True)])
async def test_a_connection_that_ends_says_nothing_of_the_guests_tools(
    step: str, *, cut: bool
) -> None:
    error = await failure_of_a_session(step, cut=cut)
    assert isinstance(error, UnavailableError)
    assert error.reason == "CHANNEL_UNAVAILABLE"


@pytest.mark.parametrize(
    ("cut", "kind", "reason"),
    [(False, FailedError, "CONNECTION_REFUSED"), (True, UnavailableError, "CONNECTION_LOST")],
)
@pytest.mark.parametrize("path", ["", "/run/a.sock"])
async def test_a_port_where_nobody_listens_is_not_a_guest_that_is_gone(
    path: str, kind: type[StrataboxError], reason: str, *, cut: bool
) -> None:
    there = Endpoint(path=path) if path else Endpoint(address="127.0.0.1", port=80)
    async with connected("connect", cut=cut) as connection:
        with pytest.raises(kind) as raised:
            await reach(connection, there)
    assert raised.value.reason == reason
