"""Kinds of values that say what forwarded ports may use at the host."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class SocketsWish(StrEnum):
    """Where Unix sockets may lie, where no folders are named."""

    AUTO = "auto"
    ANY = "any"
    NONE = "none"


@dataclass(frozen=True)
class SocketFolders:
    """Unix sockets may lie in these."""

    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return ":".join(map(str, self.paths))


class Networks:
    """IP addresses and networks, with commas between."""

    allowed: ClassVar[str] = 'IP addresses and networks with commas between, or "" for none'

    def parse(self, raw: object) -> tuple[Network, ...]:
        """Read them."""
        if not isinstance(raw, str):
            raise ValueError("it must be a string")
        return tuple(ipaddress.ip_network(part.strip()) for part in raw.split(",") if part.strip())

    def toml(self, value: object) -> str:
        """Write them."""
        assert isinstance(value, tuple)
        return json.dumps(", ".join(map(str, value)))


class Sockets:
    """Where Unix sockets may lie."""

    allowed: ClassVar[str] = '"auto", "any", "none", or absolute paths of folders with : between'

    def parse(self, raw: object) -> SocketsWish | SocketFolders:
        """Read it."""
        if not isinstance(raw, str):
            raise ValueError("it must be a string")
        if raw in list(SocketsWish):
            return SocketsWish(raw)
        paths = tuple(Path(part) for part in raw.split(":"))
        if not all(path.is_absolute() for path in paths) or not raw.isprintable():
            raise ValueError
        return SocketFolders(paths)

    def toml(self, value: object) -> str:
        """Write it."""
        return json.dumps(str(value), ensure_ascii=False)
