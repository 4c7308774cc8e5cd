"""HTTP/2's frames, as far as a relay must know them (RFC 9113, section 4).

`Frames` follows one direction of a connection and says which frames have come to their end. It sees
every byte that is passed on, so it tells few of them. It changes nothing and refuses nothing: what
makes no sense is for whoever the bytes are meant for.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client sends before its first frame."""

_HEAD = struct.Struct("!BHBBI")
_PING_BYTES = 8


class Kind(enum.IntEnum):
    """Types of frames."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    CONTINUATION = 9


ACK = END_STREAM = 1
END_HEADERS = 4
"""Flags; which of them a frame can have says its type."""

_BLOCKS = frozenset(map(int, (Kind.HEADERS, Kind.PUSH_PROMISE, Kind.CONTINUATION)))
_TOLD = frozenset(map(int, (Kind.HEADERS, Kind.RST_STREAM, Kind.PING)))


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One that is over."""

    kind: int
    flags: int
    stream: int
    payload: bytes = b""
    """Of a PING, else empty."""

    @property
    def opens(self) -> bool:
        """Sent by a client: it begins its stream, unless there was one of that number before."""
        return self.kind == Kind.HEADERS

    @property
    def closes(self) -> bool:
        """Sent by a server: its stream is over."""
        if self.kind in (Kind.DATA, Kind.HEADERS):
            return bool(self.flags & END_STREAM)
        return self.resets

    @property
    def resets(self) -> bool:
        """Its stream is broken off."""
        return self.kind == Kind.RST_STREAM


class Frames:
    """Follows one direction.

    :param skip: bytes before the first frame.
    """

    def __init__(self, skip: int = 0) -> None:
        self._skip = skip
        self._begun = b""
        """Of a frame that is not over: its head, and what is kept of its payload."""
        self._left = 0
        """Bytes of its payload that are to come, once its head is there."""
        self.lets_others_in = False
        """Another frame may be put in after all that was followed; not before the first one."""
        self.gap: int | None = None
        """Where in the last piece one may be put in first, after a frame; None: nowhere."""

    def follow(self, piece: bytes) -> list[Frame]:
        """Frames that end in the next piece: those that begin or end a stream, and PING."""
        self.gap = None
        found: list[Frame] = []
        at, size = min(self._skip, len(piece)), len(piece)
        self._skip -= at
        while at < size:
            if self._begun:
                at = self._go_on(piece, at, found)
                continue
            end = at + _HEAD.size
            if end <= size:
                end += piece[at] << 16 | piece[at + 1] << 8 | piece[at + 2]
            if end <= size:  # as a whole, which most are
                self._over(piece[at + 3], piece[at + 4], piece, at, end, found)
                at = end
            else:
                at = self._go_on(piece, at, found)
        return found

    def _go_on(self, piece: bytes, at: int, found: list[Frame]) -> int:
        """Take what the piece has of a frame that is not there as a whole; where that ends."""
        self.lets_others_in = False
        missing = _HEAD.size - len(self._begun)
        if missing > 0:
            self._begun += piece[at : at + missing]
            at += min(missing, len(piece) - at)
            if len(self._begun) < _HEAD.size:
                return at
            self._left = int.from_bytes(self._begun[:3])
        step = min(self._left, len(piece) - at)
        kept = max(0, _HEAD.size + _PING_BYTES - len(self._begun))
        self._begun += piece[at : at + min(step, kept)]
        self._left -= step
        if not self._left:
            whole, self._begun = self._begun, b""
            self._over(whole[3], whole[4], whole, 0, at + step, found)
        return at + step

    def _over(
        self, kind: int, flags: int, held: bytes, start: int, end: int, found: list[Frame]
    ) -> None:
        """One has ended, at `end` of the piece; `held` has it from `start` on, or its beginning."""
        self.lets_others_in = kind not in _BLOCKS or bool(flags & END_HEADERS)
        if self.gap is None and self.lets_others_in:
            self.gap = end
        if kind in _TOLD or (flags & END_STREAM and kind == Kind.DATA):
            payload = start + _HEAD.size
            stream = int.from_bytes(held[payload - 4 : payload]) & 0x7FFFFFFF
            pinged = held[payload : payload + _PING_BYTES] if kind == Kind.PING else b""
            found.append(Frame(kind=kind, flags=flags, stream=stream, payload=pinged))


def goaway() -> bytes:
    """Asks a client to begin nothing more here; all that it has begun is answered."""
    every, no_error = 0x7FFFFFFF, 0
    return _HEAD.pack(0, 8, Kind.GOAWAY, 0, 0) + struct.pack("!II", every, no_error)


def ping(payload: bytes) -> bytes:
    """Asks for an answer, by which all that was sent before has been read."""
    return _HEAD.pack(0, len(payload), Kind.PING, 0, 0) + payload
