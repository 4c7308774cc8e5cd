"""What goes over the port that commands go by without an sshd: bytes. Pure; see keeper_port.h."""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass

from stratabox.daemon.hypervisor.guest import exec_wire
from stratabox.daemon.hypervisor.guest.exec_heard import Output, Stream
from stratabox.daemon.hypervisor.guest.exec_wire import Said

GREETING = b"stratabox-exec 1\n"
OUTPUT_ROOM = 512 << 10
"""Bytes of output that may be on their way."""
INPUT_ROOM = 64 << 10
"""Bytes of input that may be."""
SEED_BYTES = 64
STALE_BYTES = 1 << 20
"""What an earlier user of the port can have left in QEMU's and the kernel's queues, at most."""
_FRAME_BYTES = 32 << 10
_RECORD_BYTES = 1 + 4 * 16
_HEAD = struct.Struct("<cI")
_NUMBER = struct.Struct("<I")


class NonsenseError(Exception):
    """What the guest says on the port is not its keeper's."""


@dataclass(frozen=True)
class Told:
    """The guest was told the time, and was given random numbers."""

    clock: int
    """The guest's errno; 0: it has taken it."""
    random: int


@dataclass(frozen=True)
class Taken:
    """So many bytes of input were."""

    size: int


@dataclass(frozen=True)
class Over:
    """Nothing more comes."""


Word = Output | Said | Told | Taken | Over


def opening(nanoseconds: int | None) -> bytes:
    """What comes before a request.

    :param nanoseconds: the time since 1970 UTC that the guest is told, with random numbers; None:
        it has been told.
    """
    seed = bytes(SEED_BYTES) if nanoseconds is None else secrets.token_bytes(SEED_BYTES)
    return b"SBXP" + struct.pack("<IQ", 0, nanoseconds or 0) + seed


def given(data: bytes) -> bytes:
    """Input."""
    return _HEAD.pack(b"I", len(data)) + data


def end_of_input() -> bytes:
    """There is no more input."""
    return _HEAD.pack(b"C", 0)


def taken(size: int) -> bytes:
    """So many bytes of output were."""
    return _HEAD.pack(b"O", _NUMBER.size) + _NUMBER.pack(size)


def signalled(number: int) -> bytes:
    """A signal for the command."""
    return _HEAD.pack(b"S", _NUMBER.size) + _NUMBER.pack(number)


class Greeted:
    """Looks for the greeting of whoever waits at the port; what comes before it is an earlier
    user's."""

    def __init__(self) -> None:
        self._end = b""
        self._seen = 0

    def feed(self, data: bytes) -> bool:
        """Whether it has come. :raise NonsenseError: when too much else has."""
        data = self._end + data
        if GREETING in data:
            return True
        self._seen += len(data) - len(self._end)
        if self._seen > STALE_BYTES:
            raise NonsenseError("the port is full of what is no keeper's")
        self._end = data[-len(GREETING) + 1 :]
        return False


class Words:
    """Reads what the keeper says from the request's token on.

    What comes before that is an earlier user's: a greeting that was meant for it, for instance.
    """

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._held = bytearray()
        self._seen = 0
        self._begun = False

    def feed(self, data: bytes) -> list[Word]:
        """What was said, in order. :raise NonsenseError: when it is none of this."""
        self._held += data
        if not self._begun and not self._find_token(len(data)):
            return []
        found = list[Word]()
        at = 0
        while len(self._held) - at >= _HEAD.size:
            letter, size = _HEAD.unpack_from(self._held, at)
            if size > _FRAME_BYTES:
                raise NonsenseError(f"a frame of {size} bytes")
            body = at + _HEAD.size
            if len(self._held) < body + size:
                break
            found.append(_word(letter, bytes(self._held[body : body + size])))
            at = body + size
        del self._held[:at]
        return found

    def _find_token(self, size: int) -> bool:
        at = self._held.find(self._token)
        if at >= 0:
            del self._held[: at + len(self._token)]
            self._begun = True
            return True
        self._seen += size
        if self._seen > STALE_BYTES:
            raise NonsenseError("the port is full of what is no keeper's")
        del self._held[: max(len(self._held) - len(self._token) + 1, 0)]
        return False


def _word(letter: bytes, body: bytes) -> Word:
    match letter:
        case b"O":
            return Output(Stream.STDOUT, body)
        case b"E":
            return Output(Stream.STDERR, body)
        case b"K" if len(body) == _RECORD_BYTES:
            if body[:1] == b"T":
                return _told(body)
            said = exec_wire.said(body)
            if not isinstance(said, bytes):
                return said
        case b"I" if len(body) == _NUMBER.size:
            return Taken(_NUMBER.unpack(body)[0])
        case b"Z" if not body:
            return Over()
    raise NonsenseError(f"a frame {letter!r} of {len(body)} bytes")


def _told(body: bytes) -> Told:
    try:
        return Told(int(body[1:17], 16), int(body[17:33], 16))
    except ValueError:
        raise NonsenseError("no numbers") from None
