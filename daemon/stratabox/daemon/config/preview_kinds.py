"""Kinds of the values that say where previews are served."""

from __future__ import annotations

import json
import re

from stratabox.daemon.config.kinds import ApiPorts, TcpAddress

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"


class PreviewAddress:
    """One TCP address; none: they are not served."""

    allowed = 'https://HOST:PORT, or http://HOST:PORT with a loopback HOST, or "" for nowhere'

    def parse(self, raw: object) -> TcpAddress | None:
        """Read it."""
        found = ApiPorts().parse(raw)
        if len(found) > 1:
            raise ValueError("one address only: previews would have several names")
        return found[0] if found else None

    def toml(self, value: object) -> str:
        """Write it."""
        return json.dumps("" if value is None else str(value))


class DomainName:
    """A name of the DNS."""

    allowed = "a name of the DNS in lower case, as previews.example.org"

    def parse(self, raw: object) -> str:
        """Read it."""
        if not isinstance(raw, str) or len(raw) > 180:
            raise ValueError
        if not re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", raw):
            raise ValueError
        return raw

    def toml(self, value: object) -> str:
        """Write it."""
        return json.dumps(value)
