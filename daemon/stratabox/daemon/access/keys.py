"""API keys as text: made, read, compared.

```
tk_<id: 12 letters>_<secret: 52 letters>        letters: a to z and 2 to 7 (RFC 4648's base32)
```

The id finds the row and may be shown and logged; the secret is 256 random bits. Kept of it is one
plain SHA-256: a slow hash protects secrets that can be guessed, and nobody guesses 256 bits, while
each call must be checked.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

_TOKEN = re.compile(r"tk_([a-z2-7]{12})_([a-z2-7]{52})", re.ASCII)
_SECRETS = re.compile(r"(tk_[a-z2-7]{12})_[A-Za-z0-9_-]+", re.ASCII)
_NOBODY = hashlib.sha256(secrets.token_bytes(32)).digest()
TOKEN_LENGTH = 68


@dataclass(frozen=True)
class Token:
    """A key as its holder shows it."""

    id: str
    secret: str = field(repr=False)

    def text(self) -> str:
        """The whole of it: shown once, when it is made."""
        return f"tk_{self.id}_{self.secret}"

    def hash(self) -> bytes:
        """What is kept of the secret."""
        return hashlib.sha256(self.secret.encode()).digest()

    def fits(self, kept: bytes | None) -> bool:
        """Compare with what is kept, in a time that does not tell how much of it fits.

        :param kept: None: there is no such key; that takes as long.
        """
        fits = hmac.compare_digest(self.hash(), _NOBODY if kept is None else kept)
        return fits and kept is not None


def new_token() -> Token:
    """Make a key that nobody can guess."""
    return Token(_letters(secrets.token_bytes(8))[:12], _letters(secrets.token_bytes(32)))


def parse_token(text: str) -> Token | None:
    """Read a key; None when it is none."""
    if len(text) != TOKEN_LENGTH:
        return None
    match = _TOKEN.fullmatch(text)
    return Token(match[1], match[2]) if match else None


def redacted(text: str) -> str:
    """The text with every key in it cut down to its id."""
    return _SECRETS.sub(r"\1_...", text)


def _letters(raw: bytes) -> str:
    return base64.b32encode(raw).decode().rstrip("=").lower()
