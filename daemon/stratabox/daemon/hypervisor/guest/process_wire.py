"""What the keeper says of detached processes (keeper_jobs.h): bytes of a guest that may lie."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from stratabox.daemon.hypervisor.guest.exec_heard import Stream
from stratabox.daemon.hypervisor.guest.exec_wire import Ended, Flag

ID_LETTERS = 16
MOST_PROCESSES = 64
"""That a guest keeps, running or not."""
_REQUEST_BYTES = 4096
_STATE = struct.Struct("<II11Q")
_FRAME = struct.Struct("<B3xIQ")
_FRAME_BYTES = 16384
_LATEST_NS = 1 << 62
LIST_BYTES = MOST_PROCESSES * (ID_LETTERS + _STATE.size + 4 + _REQUEST_BYTES) * 2
"""Longer lists are no keeper's."""


class NonsenseError(ValueError):
    """The bytes are no keeper's."""


@dataclass(frozen=True, kw_only=True)
class DetachedProcess:
    """One detached process, as its keeper tells of it."""

    id: str
    started_in: str
    argv: tuple[bytes, ...]
    """Shortened."""
    user: str
    pid: int
    started_at_ns: int
    """Since 1970, by the guest's clock."""
    printed: int
    kept_from: int
    ended: Ended | None


@dataclass(frozen=True)
class Kept:
    """Output of a detached process. `offset` is behind it."""

    stream: Stream
    data: bytes
    offset: int


@dataclass(frozen=True)
class Gap:
    """Output that is kept no more."""

    lost: int


def parse_list(data: bytes) -> list[DetachedProcess]:
    """Read a list. :raise NonsenseError: when it is none."""
    found = []
    at = 0
    while at < len(data):
        try:
            name = data[at : at + ID_LETTERS].decode("ascii")
            numbers = _STATE.unpack_from(data, at + ID_LETTERS)
            at += ID_LETTERS + _STATE.size
            (size,) = struct.unpack_from("<I", data, at)
        except (UnicodeDecodeError, struct.error) as error:
            raise NonsenseError("a list of processes is cut off") from error
        at += 4
        if size > _REQUEST_BYTES or at + size > len(data):
            raise NonsenseError("a process has too long a request")
        texts = data[at : at + size].removesuffix(b"\0").split(b"\0")
        user, _, sandbox, _ = (*texts, b"", b"", b"", b"")[:4]
        at += size
        found.append(
            DetachedProcess(
                id=name,
                started_in=sandbox.decode("ascii", "replace")[:64],
                argv=tuple(texts[4:]),
                user=user.decode("utf-8", "replace")[:64] or "root",
                pid=numbers[3] & 0x7FFFFFFF,
                started_at_ns=min(numbers[4], _LATEST_NS),
                printed=min(numbers[12], _LATEST_NS),
                kept_from=min(numbers[11], _LATEST_NS),
                ended=_ended(numbers) if numbers[1] else None,
            )
        )
        if len(found) > MOST_PROCESSES * 2:
            raise NonsenseError("a guest cannot have so many processes")
    return sorted(found, key=lambda each: (each.started_at_ns, each.id))


class Frames:
    """Reads what a process has printed, as it comes in pieces of any size."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> Iterator[Kept | Gap | Ended]:
        """What is whole now. :raise NonsenseError: when it is no keeper's."""
        self._held += data
        while len(self._held) >= _FRAME.size:
            stream, size, offset = _FRAME.unpack_from(self._held)
            if size > _FRAME_BYTES or offset > _LATEST_NS or not 1 <= stream <= 4:
                raise NonsenseError("what a process has printed cannot be read")
            if len(self._held) < _FRAME.size + size:
                return
            body = self._held[_FRAME.size : _FRAME.size + size]
            self._held = self._held[_FRAME.size + size :]
            match stream:
                case 1:
                    yield Kept(Stream.STDOUT, body, offset)
                case 2:
                    yield Kept(Stream.STDERR, body, offset)
                case 3:
                    yield Gap(offset)
                case _ if size == _STATE.size:
                    yield _ended(_STATE.unpack(body))
                case _:
                    raise NonsenseError("how a process ended cannot be read")


def _ended(numbers: tuple[int, ...]) -> Ended:
    code, signal, flags, duration = numbers[5:9]
    return Ended(code & 0xFF, signal & 0x7F, Flag(flags & 15), min(duration, _LATEST_NS) / 1e9)
