"""Ports and SSH of the SDK for asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Concatenate

from stratabox.client import _dial
from stratabox.client._dial import AsyncConnection
from stratabox.client._plans import Face, Method, P, Plan, R
from stratabox.client._ports import OwnPortPlans, PortPlans, SshPlans, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from stratabox.client.aio import Transport


def _method(build: Callable[Concatenate[Any, P], Plan[R]]) -> Method[P, Coroutine[Any, Any, R]]:
    return Method(build)


def _own(build: Callable[Concatenate[Any, str, P], Plan[R]]) -> Method[P, Coroutine[Any, Any, R]]:
    return Method(build)


class _Resource(Face):
    def __init__(self, plans: object, transport: Transport, *leading: str) -> None:
        self._carries = plans, transport, leading

    def _carrier(self) -> tuple[Any, Any, tuple[Any, ...]]:
        return self._carries


class AsyncPorts(_Resource):
    """Connections into guests, and out of them, that need no network; see `PortPlans`."""

    add = _method(PortPlans.add)
    list = _method(PortPlans.list)
    remove = _method(PortPlans.remove)

    async def dial(self, sandbox: str, target: Target) -> AsyncConnection:
        """Connect to something that listens in a guest.

        :param target: 80, "127.0.0.1:80", or the path of a Unix socket.
        :raise InvalidStateError: when the sandbox does not run.
        :raise ConnectionRefusedByGuestError: when nothing listens there.
        :raise NoSshdError: when the guest has no sshd.
        :raise NoSpaceError: TOO_MANY_CONNECTIONS.
        :raise UnavailableError: when the guest does not answer.
        """
        return await dial(self._carries[1], _dial.to_target(sandbox, target))

    async def dial_ssh(
        self, sandbox: str, *, user: str = "root", public_key: str = ""
    ) -> AsyncConnection:
        """Connect to a session of the guest's sshd, made for this alone. See `dial`.

        :param user: Who may log in by it.
        :param public_key: May log in, beside the sandbox's authorized keys.
        """
        return await dial(self._carries[1], _dial.to_ssh(sandbox, user, public_key))


class AsyncSsh(_Resource):
    """Who may log in to guests; see `SshPlans`."""

    set_authorized_keys = _method(SshPlans.set_authorized_keys)
    authorized_keys = _method(SshPlans.authorized_keys)
    host_keys = _method(SshPlans.host_keys)


class AsyncSandboxPorts(_Resource):
    """The ports of one sandbox; see `PortPlans`."""

    add = _own(OwnPortPlans.add)
    list = _own(OwnPortPlans.list)
    remove = _own(OwnPortPlans.remove)


class AsyncSandboxSsh(_Resource):
    """Who may log in to one guest; see `SshPlans`."""

    set_authorized_keys = _own(SshPlans.set_authorized_keys)
    authorized_keys = _own(SshPlans.authorized_keys)
    host_keys = _own(SshPlans.host_keys)


async def dial(transport: Transport, first: Any) -> AsyncConnection:
    """Connect over a transport; see `Ports.dial`."""
    return await AsyncConnection.open(transport.stub("ports", "Dial"), first, transport.address)


def ports_of(transport: Transport) -> AsyncPorts:
    """The resource of a client."""
    return AsyncPorts(PortPlans(), transport)


def ssh_of(transport: Transport) -> AsyncSsh:
    """The resource of a client."""
    return AsyncSsh(SshPlans(), transport)


def ports_of_sandbox(transport: Transport, sandbox: str) -> AsyncSandboxPorts:
    """The resource of a sandbox."""
    return AsyncSandboxPorts(OwnPortPlans(), transport, sandbox)


def ssh_of_sandbox(transport: Transport, sandbox: str) -> AsyncSandboxSsh:
    """The resource of a sandbox."""
    return AsyncSandboxSsh(SshPlans(), transport, sandbox)
