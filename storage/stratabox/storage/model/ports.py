"""The words of forwarded ports and of who may log in to a guest.

An **endpoint** is where something listens: a TCP port at an address, or a Unix socket. A **port**
is a pair of them, one at the host and one in a guest, whose connections are carried from the one
that listens to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from stratabox.storage.model.ids import PortId, SandboxId


class Direction(StrEnum):
    """Where a port leads to: the other side listens."""

    TO_GUEST = "to_guest"
    TO_HOST = "to_host"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A TCP port at an address, or a Unix socket where there is a `path`."""

    address: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        """As people write it: 127.0.0.1:80, [::1]:80 or a path."""
        if self.path:
            return self.path
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Port:
    """One forwarded port, as the catalog keeps it."""

    id: PortId
    sandbox: SandboxId
    direction: Direction
    host: Endpoint
    guest: Endpoint
    mode: int
    """Permissions of the Unix socket that listens."""
    created_at: datetime

    @property
    def listens(self) -> Endpoint:
        """The side that listens."""
        return self.host if self.direction is Direction.TO_GUEST else self.guest

    @property
    def target(self) -> Endpoint:
        """The side that is reached."""
        return self.guest if self.direction is Direction.TO_GUEST else self.host


@dataclass(frozen=True, kw_only=True)
class AuthorizedKey:
    """A key by which a user of a guest may log in."""

    user: str
    key: str
    """Type, base64 and comment, one line."""
