"""The wire to the guest's card: QEMU's `stream` network, each frame behind its length.

Non-blocking. What QEMU does not take soon is dropped as a full card drops it, so that a guest that
stands still costs no more than `WAITING_BYTES`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

WAITING_BYTES = 1 << 20
MAX_LENGTH = 0x11000
"""More than QEMU ever sends."""
_READ = 256 << 10


class LinkClosedError(Exception):
    """QEMU is gone, or speaks another language."""


class Link:
    """One end of it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._in = bytearray()
        self._out = bytearray()

    def fileno(self) -> int:
        """For polling."""
        return self._socket.fileno()

    def close(self) -> None:
        """The card has no wire."""
        self._socket.close()

    @property
    def waits(self) -> bool:
        """There is something to `flush`."""
        return bool(self._out)

    def frames(self) -> Iterator[bytes]:
        """What has come. :raise LinkClosedError: when nothing more will."""
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkClosedError from error
        if not data:
            raise LinkClosedError
        self._in += data
        place = 0
        while len(self._in) - place >= 4:
            length = int.from_bytes(self._in[place : place + 4], "big")
            if length > MAX_LENGTH:
                raise LinkClosedError
            if len(self._in) - place < 4 + length:
                break
            yield bytes(self._in[place + 4 : place + 4 + length])
            place += 4 + length
        del self._in[:place]

    def send(self, frame: bytes) -> bool:
        """Put a frame on the wire, at the next `flush`; False: it was dropped."""
        if len(self._out) > WAITING_BYTES:
            return False
        self._out += len(frame).to_bytes(4, "big")
        self._out += frame
        return True

    def flush(self) -> None:
        """Send what QEMU takes. :raise LinkClosedError: when it is gone."""
        try:
            while self._out:
                sent = self._socket.send(self._out)
                del self._out[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkClosedError from error
