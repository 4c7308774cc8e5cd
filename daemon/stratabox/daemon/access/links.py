"""Links that whoever has them may use for a while: signed, so that no list of them is kept.

The secret is of this daemon's run: links do not outlive it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import UTC, datetime, timedelta

LIFE = timedelta(minutes=15)
SNAPSHOTS = "/snapshots/"
"""Path below which each snapshot is downloaded, by its id."""


class Links:
    """Signs links, and knows its own again."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def sign(self, thing: str) -> tuple[str, datetime]:
        """A query that lets its holder have something, and until when."""
        expires_at = (datetime.now(UTC) + LIFE).replace(microsecond=0)
        expires = str(int(expires_at.timestamp()))
        return f"expires={expires}&signature={self._signature(thing, expires)}", expires_at

    def is_good(self, thing: str, expires: str, signature: str) -> bool:
        """It was signed here for that, and its time is not up."""
        expected = self._signature(thing, expires)
        if not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")):
            return False
        return datetime.now(UTC).timestamp() < int(expires)

    def _signature(self, thing: str, expires: str) -> str:
        signed = f"{thing}\n{expires}".encode("utf-8", "replace")
        return hmac.new(self._secret, signed, hashlib.sha256).hexdigest()
