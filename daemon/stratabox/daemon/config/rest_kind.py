"""Kinds of the values that say where HTTP is served, and where clients find the API."""

from __future__ import annotations

import json

from stratabox.daemon.config.kinds import Address, ApiAddress, TcpAddress


class RestAddresses:
    """Addresses, with commas between; none: it is not served."""

    allowed = f'{ApiAddress.allowed}; several with commas between, or "" for none'

    def parse(self, raw: object) -> tuple[Address, ...]:
        """Read them."""
        if not isinstance(raw, str):
            raise ValueError("it must be a string")
        words = [part.strip() for part in raw.split(",") if part.strip()]
        return tuple(dict.fromkeys(ApiAddress().parse(word) for word in words))

    def toml(self, value: object) -> str:
        """Write them."""
        assert isinstance(value, tuple)
        return json.dumps(", ".join(map(str, value)), ensure_ascii=False)


class MetricsAddresses(RestAddresses):
    """Addresses, with commas between, where HOST:PORT alone is http; none: they are not served."""

    allowed = f'HOST:PORT, {ApiAddress.allowed}; several with commas between, or "" for none'

    def parse(self, raw: object) -> tuple[Address, ...]:
        """Read them."""
        if not isinstance(raw, str):
            raise ValueError("it must be a string")
        words = [part.strip() for part in raw.split(",")]
        return super().parse(
            ",".join(word if "://" in word or not word else f"http://{word}" for word in words)
        )


class Endpoint:
    """An address that clients are told of; empty becomes None."""

    allowed = 'https://HOST:PORT, http://HOST:PORT with a loopback HOST, or "" for none'

    def parse(self, raw: object) -> TcpAddress | None:
        """Read it."""
        if raw == "":
            return None
        address = ApiAddress().parse(raw)
        if not isinstance(address, TcpAddress):
            raise ValueError("other hosts' clients find no Unix socket")
        return address

    def toml(self, value: object) -> str:
        """Write it."""
        return json.dumps("" if value is None else str(value), ensure_ascii=False)
