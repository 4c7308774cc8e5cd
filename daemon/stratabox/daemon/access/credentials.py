"""Credentials of sessions: what opens Tenki's data plane, for one session and a little while.

```
sc_<base64url: session, 16 bytes · key, 12 · expiry, 8 · HMAC-SHA-256 of those, 32>
```

Nothing is kept of one: whoever has the daemon's secret knows it again, also after a restart. It
names the API key that asked for it, and opens nothing any more once that key does not; the gate
looks at that, and the data plane at the session.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from stratabox.storage.model.errors import UnauthenticatedError

LIFETIME = timedelta(minutes=15)
"""Clients ask for the next one when half of it is over."""

_PREFIX = "sc_"
_BODY = struct.Struct(">16s12sQ")
_PURPOSE = b"stratabox session credential\n"
_LENGTH = len(_PREFIX) + -(-(_BODY.size + hashlib.sha256().digest_size) * 4 // 3)


@dataclass(frozen=True)
class Claim:
    """What a credential says."""

    session: str
    """Id of the sandbox."""
    key: str | None
    """Id of the API key that asked for it; None: it was asked for by the Unix socket."""
    expires_at: datetime


class Credentials:
    """Makes and reads them.

    :param secret: that they are signed with; who has it can make any.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def issue(self, session: str, key: str | None, now: datetime) -> tuple[str, Claim]:
        """One that opens that session for `LIFETIME`, and what it says."""
        expires = int((now + LIFETIME).timestamp())
        body = _BODY.pack(uuid.UUID(session).bytes, (key or "").encode(), expires)
        raw = body + self._sign(body)
        text = _PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")
        return text, Claim(session, key, datetime.fromtimestamp(expires, UTC))

    def read(self, text: str | None, now: datetime) -> Claim:
        """What a credential says, once it is known to be one of ours.

        :raise UnauthenticatedError: NO_CREDENTIAL; INVALID_CREDENTIAL; CREDENTIAL_EXPIRED, to
            whoever had a good one.
        """
        if not text:
            raise UnauthenticatedError(
                "the data plane takes a session's credential, and none was given: ask for one with"
                " CreateSessionCredential",
                reason="NO_CREDENTIAL",
            )
        raw = _decoded(text)
        body, signature = raw[: _BODY.size], raw[_BODY.size :]
        if not hmac.compare_digest(self._sign(body), signature):
            raise invalid("not one of ours")
        session, key, expires = _BODY.unpack(body)
        claim = Claim(
            str(uuid.UUID(bytes=session)),
            key.rstrip(b"\0").decode() or None,
            datetime.fromtimestamp(expires, UTC),
        )
        if now >= claim.expires_at:
            raise UnauthenticatedError(
                "the time of this session's credential is up: ask for another with"
                " CreateSessionCredential",
                reason="CREDENTIAL_EXPIRED",
                why=f"expired session:{claim.session}",
            )
        return claim

    def _sign(self, body: bytes) -> bytes:
        return hmac.digest(self._secret, _PURPOSE + body, "sha256")


def invalid(why: str) -> UnauthenticatedError:
    """For a credential that opens nothing, or not this.

    :param why: for the audit log alone.
    """
    return UnauthenticatedError(
        "the session's credential is not valid: ask for another with CreateSessionCredential",
        reason="INVALID_CREDENTIAL",
        why=why,
    )


def _decoded(text: str) -> bytes:
    if len(text) != _LENGTH or not text.startswith(_PREFIX):
        raise invalid("malformed")
    encoded = text.removeprefix(_PREFIX)
    padded = encoded + "=" * (-len(encoded) % 4)
    try:
        raw = base64.b64decode(padded, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise invalid("malformed") from None
    if base64.urlsafe_b64encode(raw).decode() != padded:  # bits beyond the last byte
        raise invalid("malformed")
    return raw
