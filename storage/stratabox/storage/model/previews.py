"""The words of previews: web pages of guests, each on an origin of its own.

A **preview** is a name under which a browser finds what listens on a port of a guest. It is *bound*
while it has a sandbox and a port. Whoever knows its token may see the page: that is the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from stratabox.storage.model.ids import PreviewId, SandboxId


@dataclass(frozen=True, kw_only=True)
class Preview:
    """One preview, as the catalog keeps it."""

    id: PreviewId
    workspace: str
    slug: str
    """Its name for people; one preview's in its workspace."""
    token: str
    """What nobody can guess; in its address."""
    exposed: bool
    """Made by exposing a port: it is gone when it is not bound any more."""
    sandbox: SandboxId | None
    port: int | None
    expires_at: datetime | None
    """From then on it shows nothing."""
    created_at: datetime
    updated_at: datetime
    accessed_at: datetime | None
    """When somebody looked at it, to some minutes."""

    @property
    def is_bound(self) -> bool:
        """It leads to a sandbox."""
        return self.sandbox is not None

    def is_over(self, now: datetime) -> bool:
        """Its time is up."""
        return self.expires_at is not None and self.expires_at <= now
