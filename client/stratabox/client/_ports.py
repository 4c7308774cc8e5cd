"""The plans of `client.ports` and `client.ssh`."""

from __future__ import annotations

import builtins
import re
from collections.abc import Sequence

from stratabox.client import _convert, _requests
from stratabox.client._plans import Call, Plan
from stratabox.client.errors import InvalidArgumentError
from stratabox.client.port_records import AuthorizedKey, Endpoint, Port, PortDirection
from stratabox.v1 import ports_pb2 as pb
from stratabox.v1 import ssh_pb2

SERVICE = "ports"
SSH = "ssh"

#: A port, an address and a port, or the path of a Unix socket.
Target = Endpoint | int | str

_ENDPOINT = r"(?:/[^:]*|(?:(?:\[[^]]+\]|[^:/[\]]*[^:/[\]0-9][^:/[\]]*):)?[0-9]{1,5})"
_ONE = re.compile(r"(?:(\[[^]]+\]|[^:/[\]]+):)?([0-9]{1,5})")
_TWO = re.compile(f"(?:({_ENDPOINT}):)?({_ENDPOINT})")


class PortPlans:
    """Connections into guests, and out of them, that need no network.

    What listens stays until it is removed or the sandbox is over, through restarts of the daemon,
    reboots and pauses of the guest. Copies of the sandbox do not have it.
    """

    def add(
        self,
        sandbox: str,
        guest: Target,
        host: Target = 0,
        *,
        direction: PortDirection | str = PortDirection.TO_GUEST,
        mode: int = 0,
    ) -> Plan[Port]:
        """Forward a port.

        :param guest: In the guest: 80, "127.0.0.1:80", or the path of a Unix socket.
        :param host: At the daemon's host, likewise; 0: a free port is chosen.
        :param direction: "to_guest": the host listens. "to_host": the guest listens.
        :param mode: Permissions of the Unix socket that listens; 0: 0o600.
        :raise PortInUseError: when the port or path is taken.
        :raise PortNotAllowedError: when the daemon's configuration does not allow it.
        :raise FailedError: LISTEN_FAILED, when it cannot be listened there otherwise.
        :raise NoSpaceError: TOO_MANY_PORTS.
        :raise NoSshdError: when the guest has no sshd, and has to listen.
        """
        with _requests.checked():
            request = pb.AddPortRequest(
                sandbox=sandbox,
                direction=_convert.number(PortDirection, direction),
                host=endpoint_of(host),
                guest=endpoint_of(guest),
                mode=mode,
            )
        return Call(SERVICE, "AddPort", request, _port)

    def list(self, sandbox: str | None = None) -> Plan[builtins.list[Port]]:
        """Return the ports of one sandbox, or of all, oldest first."""
        with _requests.checked():
            request = pb.ListPortsRequest(sandbox=sandbox or "")
        return Call(SERVICE, "ListPorts", request, _ports)

    def remove(self, port: str) -> Plan[None]:
        """Stop listening, and close the port's connections.

        :param port: Its id.
        :raise PortNotFoundError: when there is no such port.
        """
        with _requests.checked():
            request = pb.RemovePortRequest(id=port)
        return Call(SERVICE, "RemovePort", request, _nothing)


class OwnPortPlans:
    """The ports of one sandbox; as `PortPlans`."""

    def add(
        self,
        sandbox: str,
        guest: Target,
        host: Target = 0,
        *,
        direction: PortDirection | str = PortDirection.TO_GUEST,
        mode: int = 0,
    ) -> Plan[Port]:
        """Forward a port; see `client.ports.add`."""
        return PortPlans().add(sandbox, guest, host, direction=direction, mode=mode)

    def list(self, sandbox: str) -> Plan[builtins.list[Port]]:
        """Return its ports, oldest first."""
        return PortPlans().list(sandbox)

    def remove(self, sandbox: str, port: str) -> Plan[None]:
        """Stop listening, and close the port's connections; see `client.ports.remove`."""
        return PortPlans().remove(port)


class SshPlans:
    """Who may log in to a guest by the sessions that `stratabox ssh-config` leads to.

    The keys are kept by the daemon, and nothing is written in the guest.
    """

    def set_authorized_keys(
        self, sandbox: str, public_keys: Sequence[str], *, user: str = "root"
    ) -> Plan[builtins.list[AuthorizedKey]]:
        """Replace the keys by which one user of the guest may log in, and return them.

        :param public_keys: Each as in a .pub file, none with options.
        :raise InvalidArgumentError: for what is no key, or a weak one, or more than 64.
        """
        with _requests.checked():
            request = ssh_pb2.SetAuthorizedKeysRequest(
                sandbox=sandbox, user=user, public_keys=public_keys
            )
        return Call(SSH, "SetAuthorizedKeys", request, _keys)

    def authorized_keys(
        self, sandbox: str, *, user: str | None = None
    ) -> Plan[builtins.list[AuthorizedKey]]:
        """Return the keys of one user, or of all."""
        with _requests.checked():
            request = ssh_pb2.ListAuthorizedKeysRequest(sandbox=sandbox, user=user or "")
        return Call(SSH, "ListAuthorizedKeys", request, _keys)

    def host_keys(self, sandbox: str) -> Plan[builtins.list[str]]:
        """Return the guest's host keys, learnt from it by a way that is trusted.

        :raise NoSshdError: when the guest has no sshd.
        """
        with _requests.checked():
            request = ssh_pb2.GetHostKeysRequest(sandbox=sandbox)
        return Call(SSH, "GetHostKeys", request, lambda message: list(message.host_keys))


def endpoint_of(target: Target) -> pb.Endpoint:
    """Turn what callers give into a message.

    :raise InvalidArgumentError: when it is none.
    """
    one = target if isinstance(target, Endpoint) else parse(str(target))
    return pb.Endpoint(address=one.address or "", port=one.port or 0, path=one.path or "")


def parse(text: str) -> Endpoint:
    """Read 80, 127.0.0.1:80, [::1]:80 or /path.

    :raise InvalidArgumentError: when it is none of them.
    """
    if text.startswith("/"):
        return Endpoint(path=text)
    match = _ONE.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(
            f"{text!r} is neither PORT, ADDRESS:PORT, [ADDRESS]:PORT nor /PATH"
        )
    return Endpoint(address=match[1].strip("[]") if match[1] else None, port=int(match[2]))


def parse_pair(text: str) -> tuple[Endpoint | None, Endpoint]:
    """Read LISTENS:TARGET, each as for `parse`, or TARGET alone. Paths must hold no ":" here.

    :raise InvalidArgumentError: when it is not that.
    """
    match = _TWO.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(
            f"{text!r} is not [LISTENS:]TARGET, each of them PORT, ADDRESS:PORT or /PATH"
        )
    return parse(match[1]) if match[1] else None, parse(match[2])


def _endpoint(message: pb.Endpoint) -> Endpoint:
    if message.path:
        return Endpoint(path=message.path)
    return Endpoint(address=message.address, port=message.port)


def _port(message: pb.Port) -> Port:
    return Port(
        id=message.id,
        sandbox_id=message.sandbox_id,
        direction=_convert.word(PortDirection, message.direction),
        host=_endpoint(message.host),
        guest=_endpoint(message.guest),
        mode=message.mode,
        listening=message.listening,
        problem=message.problem or None,
        connections=message.connections,
        created_at=_convert.moment(message.created_at),
    )


def _ports(message: pb.ListPortsResponse) -> builtins.list[Port]:
    return [_port(one) for one in message.ports]


def _keys(message: ssh_pb2.ListAuthorizedKeysResponse) -> builtins.list[AuthorizedKey]:
    return [
        AuthorizedKey(user=one.user, public_key=one.public_key, fingerprint=one.fingerprint)
        for one in message.keys
    ]


def _nothing(message: pb.RemovePortResponse) -> None:
    return None
