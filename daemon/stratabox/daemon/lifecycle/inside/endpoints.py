"""What may be forwarded: pure, but for `require_folder`, which looks where a socket would lie."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.config import Config
from stratabox.daemon.config.kinds import SOCKET_PATH_LIMIT
from stratabox.daemon.config.port_kinds import Network, SocketFolders, SocketsWish
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError
from stratabox.storage.model.ports import Endpoint

LOOPBACK = "127.0.0.1"
MODE = 0o600
"""Permissions of a Unix socket that listens, where none are given."""

_OTHERS = 0o007


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the configuration allows at the host, beside its loopback addresses."""

    networks: Sequence[Network]
    folders: Sequence[Path] | None
    """Where Unix sockets may lie; None: anywhere."""
    reaches_loopback: bool = True
    """Whoever uses the API may reach this host's loopback: they are on this host themselves."""


def rules_of(config: Config) -> Rules:
    """The rules of a configuration."""
    return Rules(
        networks=config.ports_addresses,
        folders=_folders(config),
        reaches_loopback=all(each.is_loopback for each in config.doors),
    )


def checked(endpoint: Endpoint, *, listens: bool, what: str) -> Endpoint:
    """An endpoint of either side, with its address spelled out.

    :param listens: it may leave the choice of a free port to us.
    :param what: the field, for the message.
    :raise InvalidArgumentError: when it cannot be.
    """
    if endpoint.path:
        if endpoint.address or endpoint.port:
            raise InvalidArgumentError(
                f"{what} has a path and a port: give one of them", field=what
            )
        return Endpoint(path=_path(endpoint.path, what))
    lowest = 0 if listens else 1
    if not lowest <= endpoint.port <= 65535:
        raise InvalidArgumentError(
            f"{what} has port {endpoint.port}, which is not from {lowest} to 65535", field=what
        )
    return Endpoint(address=_address(endpoint.address, what), port=endpoint.port)


def require_allowed(endpoint: Endpoint, rules: Rules, *, listens: bool) -> None:
    """Hold an endpoint of the host to the rules; what `checked` has returned.

    :param listens: the host listens there; otherwise it is reached.
    :raise DeniedError: PORT_NOT_ALLOWED, with the key of the configuration that would allow it.
    """
    if endpoint.path:
        require_folder(endpoint.path, rules)
        return
    address = ipaddress.ip_address(endpoint.address)
    if any(address.version == each.version and address in each for each in rules.networks):
        return
    if address.is_loopback and (listens or rules.reaches_loopback):
        return
    raise DeniedError(
        f"forwarded ports may not use {address} at the daemon's host: allow it by ports.addresses"
        " in the daemon's configuration",
        reason="PORT_NOT_ALLOWED",
        address=address,
    )


def require_folder(path: str, rules: Rules) -> None:
    """Hold a Unix socket of the host to the rules.

    :raise DeniedError: PORT_NOT_ALLOWED.
    """
    if rules.folders is None:
        return
    folder = Path(os.path.realpath(Path(path).parent))
    if not any(folder.is_relative_to(os.path.realpath(each)) for each in rules.folders):
        raise DeniedError(
            f"the daemon may not use sockets in {folder}: allow it by ports.sockets in its"
            " configuration, or let the client listen (stratabox sandbox port forward)",
            reason="PORT_NOT_ALLOWED",
            path=path,
        )


def mode_from(mode: int) -> int:
    """The permissions of a Unix socket. :raise InvalidArgumentError: when they are none."""
    if not 0 <= mode <= 0o777:
        raise InvalidArgumentError(f"{mode:o} are no permissions of a socket", field="mode")
    return mode or MODE


def _path(path: str, what: str) -> str:
    if not path.startswith("/") or any(not char.isprintable() for char in path):
        raise InvalidArgumentError(
            f"{what} is no absolute path without control characters: {path!r}", field=what
        )
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise InvalidArgumentError(
            f"{what} is longer than {SOCKET_PATH_LIMIT} bytes, which is all that a Unix socket's"
            " path may have",
            field=what,
        )
    return os.path.normpath(path)


def _address(text: str, what: str) -> str:
    if text in ("", "localhost"):
        return LOOPBACK
    try:
        address = ipaddress.ip_address(text)
        if isinstance(address, ipaddress.IPv6Address):
            if address.scope_id is not None:
                raise ValueError
            # Or it would pass the rules as one thing and be reached as another.
            address = address.ipv4_mapped or address
    except ValueError:
        raise InvalidArgumentError(
            f'{what} has the address {text!r}, which is neither an IP address nor "localhost"',
            field=what,
        ) from None
    return str(address)


def _folders(config: Config) -> Sequence[Path] | None:
    match config.ports_sockets:
        case SocketFolders(paths=paths):
            return paths
        case SocketsWish.ANY:
            return None
        case SocketsWish.NONE:
            return ()
        case SocketsWish.AUTO:
            # Whoever may speak to the API could reach all that the daemon's user can by it.
            private = not config.doors and config.socket_group is None
            return None if private and not config.socket_mode & _OTHERS else ()
