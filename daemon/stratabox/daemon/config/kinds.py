"""What a configuration value may look like: one class for each kind of value.

A kind reads a value as TOML gave it (string, integer, …) or as text from the environment or a
flag, says in words what it allows, and writes the value back as TOML. It looks at nothing but the
value; keys, sources and defaults are the business of ``config.keys`` and ``config``.
"""

from __future__ import annotations

import grp
import ipaddress
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Protocol
from urllib.parse import urlsplit

SOCKET_PATH_LIMIT = 107
"""Bytes that the kernel takes as the path of a Unix socket."""


class Kind(Protocol):
    """One kind of value."""

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""

    def parse(self, raw: object) -> object:
        """Read a value.

        :raise ValueError: when it is not allowed; its text, if any, says more than `allowed`.
        """

    def toml(self, value: object) -> str:
        """Write a value that `parse` gave."""


def _text(raw: object) -> str:
    if not isinstance(raw, str):
        raise ValueError("it must be a string")
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in raw):
        raise ValueError("it holds control characters")
    return raw


def _quoted(value: object) -> str:
    return json.dumps("" if value is None else str(value), ensure_ascii=False)


@dataclass(frozen=True)
class Text:
    """Free text, or what a pattern allows. Empty text becomes None where that is allowed."""

    allowed: str
    pattern: str = ".+"
    optional: bool = False

    def parse(self, raw: object) -> str | None:
        """Read it."""
        text = _text(raw)
        if not text and self.optional:
            return None
        if not re.fullmatch(self.pattern, text):
            raise ValueError
        return text

    def toml(self, value: object) -> str:
        """Write it."""
        return _quoted(value)


@dataclass(frozen=True)
class Choice:
    """One of an enumeration's words."""

    members: type[StrEnum]

    @property
    def allowed(self) -> str:
        """The words."""
        return _either(f'"{member.value}"' for member in self.members)

    def parse(self, raw: object) -> StrEnum:
        """Read it."""
        try:
            return self.members(_text(raw))
        except ValueError:
            raise ValueError from None

    def toml(self, value: object) -> str:
        """Write it."""
        return _quoted(value)


@dataclass(frozen=True)
class Integer:
    """A whole number between two limits, both included."""

    low: int
    high: int
    unit: str = ""

    @property
    def allowed(self) -> str:
        """The limits."""
        return f"{self.low} to {self.high}" + (f" {self.unit}" if self.unit else "")

    def parse(self, raw: object) -> int:
        """Read it."""
        if isinstance(raw, str) and re.fullmatch(r"[+-]?[0-9]{1,20}", raw):
            raw = int(raw)
        if not isinstance(raw, int) or isinstance(raw, bool):
            raise ValueError("it must be a whole number")
        if not self.low <= raw <= self.high:
            raise ValueError
        return raw

    def toml(self, value: object) -> str:
        """Write it."""
        return str(value)


_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")


def _seconds(raw: object) -> float:
    if isinstance(raw, str):
        text = raw.strip()
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
            return float(text)
        if not re.fullmatch(f"(?:{_DURATION.pattern})+", text):
            raise ValueError('it must be a duration such as "30s", "10m", "1h" or a number')
        return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in _DURATION.findall(text))
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        raise ValueError("it must be a duration or a number of seconds")
    return float(raw)


@dataclass(frozen=True)
class Duration:
    """A length of time, kept in seconds: "500ms", "30s", "10m", "1h30m", or a number."""

    low: float
    high: float

    @property
    def allowed(self) -> str:
        """The limits."""
        return f"{_duration_text(self.low)} to {_duration_text(self.high)}"

    def parse(self, raw: object) -> float:
        """Read it."""
        seconds = _seconds(raw)
        if not self.low <= seconds <= self.high:
            raise ValueError
        return seconds

    def toml(self, value: object) -> str:
        """Write it."""
        assert isinstance(value, float)
        return _quoted(_duration_text(value))


def _duration_text(seconds: float) -> str:
    for unit in ("h", "m"):
        if seconds and seconds % _UNIT_SECONDS[unit] == 0:
            return f"{seconds / _UNIT_SECONDS[unit]:.0f}{unit}"
    return f"{seconds:.10g}s"


_SIZES = {"": 1} | {unit: 1 << (10 * power) for power, unit in enumerate("KMGT", start=1)}


@dataclass(frozen=True)
class Size:
    """A number of bytes: 1073741824, "1GiB", "1G" (the same: units are powers of 1024)."""

    low: int
    high: int

    @property
    def allowed(self) -> str:
        """The limits."""
        return f"{_size_text(self.low)} to {_size_text(self.high)}"

    def parse(self, raw: object) -> int:
        """Read it."""
        if isinstance(raw, str):
            match = re.fullmatch(r"([0-9]{1,20}) ?([KMGT]?)(?:iB|B)?", raw.strip())
            if not match:
                raise ValueError('it must be a number of bytes or a size such as "64GiB"')
            raw = int(match[1]) * _SIZES[match[2]]
        if not isinstance(raw, int) or isinstance(raw, bool):
            raise ValueError('it must be a number of bytes or a size such as "64GiB"')
        if not self.low <= raw <= self.high:
            raise ValueError
        return raw

    def toml(self, value: object) -> str:
        """Write it."""
        assert isinstance(value, int)
        text = _size_text(value)
        return text if text.isdigit() else _quoted(text)


def _size_text(value: int) -> str:
    for unit in "TGMK":
        if value and value % _SIZES[unit] == 0:
            return f"{value // _SIZES[unit]}{unit}iB"
    return str(value)


class Mode:
    """Permission bits of a file, as an octal string: an integer's base would be a guess."""

    allowed = '"0600" to "0777", an octal string; the owner reads and writes'

    def parse(self, raw: object) -> int:
        """Read it."""
        if not re.fullmatch(r"(0o?)?[67][0-7]{2}", _text(raw)):
            raise ValueError
        return int(_text(raw).removeprefix("0o"), 8)

    def toml(self, value: object) -> str:
        """Write it."""
        return f'"{value:04o}"'


@dataclass(frozen=True)
class Folder:
    """A path from the root; ``~`` is the home folder. Empty becomes None where that is allowed."""

    optional: bool = False

    @property
    def allowed(self) -> str:
        """What a path must be."""
        return 'an absolute path, or "" for none' if self.optional else "an absolute path"

    def parse(self, raw: object) -> Path | None:
        """Read it."""
        text = _text(raw)
        if not text and self.optional:
            return None
        try:
            path = Path(text).expanduser()
        except RuntimeError as error:
            raise ValueError("that user has no home folder") from error
        if not path.is_absolute() or path == Path("/"):
            raise ValueError
        return path

    def toml(self, value: object) -> str:
        """Write it."""
        return _quoted(value)


@dataclass(frozen=True)
class UnixAddress:
    """A Unix socket in the file system."""

    path: Path

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True)
class TcpAddress:
    """A port: with TLS on any address of this host, without on its loopback alone."""

    host: str
    port: int
    tls: bool = False

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.target}"

    @property
    def is_loopback(self) -> bool:
        """Whether programs on this host alone can reach it."""
        return _is_loopback(self.host)

    @property
    def target(self) -> str:
        """Host and port as gRPC takes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Address = UnixAddress | TcpAddress


class ApiAddress:
    """Where the API listens."""

    allowed = "unix:///PATH, https://HOST:PORT, or http://HOST:PORT with a loopback HOST"

    def parse(self, raw: object) -> Address:
        """Read it."""
        text = _text(raw)
        if text.startswith("unix:///"):
            path = Path(text.removeprefix("unix://"))
            if len(bytes(path)) > SOCKET_PATH_LIMIT:
                raise ValueError(f"a Unix socket's path has {SOCKET_PATH_LIMIT} bytes at most")
            if path == Path("/"):
                raise ValueError
            return UnixAddress(path)
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ValueError from None
        known = parts.scheme in ("http", "https")
        plain = not (parts.query or parts.fragment or parts.username)
        if not known or not plain or not host or not port or parts.path not in ("", "/"):
            raise ValueError
        if parts.scheme == "http" and not _is_loopback(host):
            raise ValueError(
                "without TLS only loopback hosts (localhost, 127.0.0.1, [::1]): elsewhere keys and "
                "all else would travel in the clear; https:// with tls.certificate and tls.key"
            )
        return TcpAddress(host, port, tls=parts.scheme == "https")

    def toml(self, value: object) -> str:
        """Write it."""
        return _quoted(value)


class ApiPorts:
    """Further addresses where the API listens."""

    allowed = "https://HOST:PORT, or http://HOST:PORT with a loopback HOST; several with commas"

    def parse(self, raw: object) -> tuple[TcpAddress, ...]:
        """Read them."""
        found: list[TcpAddress] = []
        for part in _text(raw).split(","):
            if part.strip():
                address = ApiAddress().parse(part.strip())
                if not isinstance(address, TcpAddress):
                    raise ValueError("a Unix socket is named by `address`")
                if address not in found:
                    found.append(address)
        return tuple(found)

    def toml(self, value: object) -> str:
        """Write them."""
        assert isinstance(value, tuple)
        return _quoted(", ".join(map(str, value)))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Group:
    """A group of this host, by name or number; empty becomes None."""

    allowed: ClassVar[str] = 'the name or number of a group on this host, or "" for none'

    def parse(self, raw: object) -> str | None:
        """Read it."""
        text = _text(raw)
        if not text:
            return None
        try:
            if text.isdecimal():
                grp.getgrgid(int(text))
            else:
                grp.getgrnam(text)
        except (KeyError, OverflowError):
            raise ValueError("this host has no such group") from None
        return text

    def toml(self, value: object) -> str:
        """Write it."""
        return _quoted(value)


def _either(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
