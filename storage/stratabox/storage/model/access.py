"""Who may do what: roles, and the records of API keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


class Role(StrEnum):
    """What a caller may do; each may do all that those before it may."""

    READ_ONLY = "read-only"
    """See records, events and figures; never what is inside a guest."""
    USER = "user"
    """Everything with sandboxes, snapshots and volumes of its workspace."""
    ADMIN = "admin"
    """Also what concerns the host, the store and the images; and that in every workspace."""

    def covers(self, least: Role) -> bool:
        """Whether this one may do what takes at least that one."""
        order = list(Role)
        return order.index(self) >= order.index(least)


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One key, without its secret: that is known to its holder alone."""

    id: str
    name: str
    role: Role
    workspace: str
    hash: bytes = field(repr=False)
    """SHA-256 of the secret."""
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    """To the minute, roughly: not every call is written down."""

    def is_over(self, now: datetime) -> bool:
        """Whether its time is up."""
        return self.expires_at is not None and now >= self.expires_at

    def is_good(self, now: datetime) -> bool:
        """Whether it opens anything."""
        return self.revoked_at is None and not self.is_over(now)
