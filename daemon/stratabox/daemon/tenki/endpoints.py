"""Where a client finds the data plane: the same server, under an address that it can reach.

gRPC does not tell a method by which name its client came; so it is chosen among the addresses of
the configuration by what is known of the connection.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import grpc.aio

from stratabox.daemon.config import Config
from stratabox.daemon.config.kinds import TcpAddress
from stratabox.storage.model.errors import DeniedError

_EVERYWHERE = ("0.0.0.0", "::", "*")


def data_plane(config: Config, context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The data plane's address for the client of this call, "" for one at the Unix socket.

    :raise DeniedError: NO_ENDPOINT, where the configuration does not say.
    """
    peer = context.peer()
    if peer.startswith("unix:"):
        return ""
    if config.endpoint is not None:
        return str(config.endpoint)
    secure = context.auth_context().get("transport_security_type") == [b"ssl"]
    fitting = [each for each in config.ports if each.tls == secure]
    near = _is_near(peer)
    named = [each for each in fitting if each.host not in _EVERYWHERE]
    for address in (*(each for each in named if each.is_loopback == near), *named):
        if near or not address.is_loopback:
            return str(address)
    if near and fitting:
        return str(TcpAddress("127.0.0.1", fitting[0].port, tls=secure))
    raise DeniedError(
        "the daemon listens on all addresses, and its configuration does not say by which name"
        " clients reach it: set endpoint",
        reason="NO_ENDPOINT",
    )


def _is_near(peer: str) -> bool:
    text = unquote(peer)
    return text.startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:[::ffff:127."))
