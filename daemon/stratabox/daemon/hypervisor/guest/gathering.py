"""Small pieces of a stream, gathered into larger ones before they are passed on.

Each message to a caller costs the daemon and the caller some 0.2 ms of a CPU, and a guest sends 32
KiB at a time. A piece that large says that more follows; what is smaller is passed on at once, so
nothing that somebody waits for comes later.
"""

from __future__ import annotations

import asyncio

PIECE = 256 << 10
"""Bytes that are passed on at once, at most."""

_LARGE = 16 << 10
"""Bytes that have come together where more is likely to follow."""
_LINGER_SECONDS = 0.008
"""How long more is waited for, at most."""


class Gathering:
    """What the reader of one stream waits by."""

    def __init__(self) -> None:
        self._enough = asyncio.Event()
        self._ended = False

    def grew(self, size: int) -> None:
        """So many bytes wait by now."""
        if size >= PIECE:
            self._enough.set()

    def end(self) -> None:
        """No more will come."""
        self._ended = True
        self._enough.set()

    async def more(self, size: int) -> None:
        """Wait for more, for a moment, where that is likely to come.

        :param size: bytes that wait already.
        """
        if self._ended or not _LARGE <= size < PIECE:
            return
        self._enough.clear()
        timer = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._enough.set)
        try:
            await self._enough.wait()
        finally:
            timer.cancel()
