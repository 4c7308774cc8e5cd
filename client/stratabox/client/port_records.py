"""The records of forwarded ports, and of keys that may log in."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class PortDirection(StrEnum):
    """Where a port leads to: the other side listens."""

    TO_GUEST = "to_guest"
    TO_HOST = "to_host"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A TCP port at an address, or a Unix socket."""

    #: None: 127.0.0.1, or a socket.
    address: str | None = None
    #: 0: a free one is chosen, where it listens at the host. None: a socket.
    port: int | None = None
    #: Of a Unix socket.
    path: str | None = None

    def __str__(self) -> str:
        """As people write it: 127.0.0.1:80, [::1]:80 or a path."""
        if self.path is not None:
            return self.path
        address = self.address or "127.0.0.1"
        return f"[{address}]:{self.port}" if ":" in address else f"{address}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Port:
    """One forwarded port."""

    id: str
    sandbox_id: str
    direction: PortDirection
    host: Endpoint
    guest: Endpoint
    #: Permissions of the Unix socket that listens.
    mode: int
    #: Now.
    listening: bool
    #: Why it does not listen; None where the guest is just not running.
    problem: str | None
    #: That are open now.
    connections: int
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class AuthorizedKey:
    """A key by which a user of a guest may log in."""

    user: str
    #: As in a .pub file: type, base64, comment.
    public_key: str
    #: As "SHA256:...".
    fingerprint: str
