"""So many bytes a second, all jobs together: a bucket that fills evenly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_BURST_SECONDS = 0.1


class Rate:
    """A limit for threads that read and write in the background.

    :param bytes_per_second: 0: no limit.
    """

    def __init__(self, bytes_per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._free_at = clock()
        self._lock = threading.Lock()

    def take(self, size: int, stop: threading.Event) -> bool:
        """Have moved `size` bytes; return when the next may be.

        :param stop: ends the waiting.
        :return: False when it was ended.
        """
        if not self._rate:
            return not stop.is_set()
        with self._lock:
            now = self._clock()
            # What was not used is forgotten but for a moment's worth.
            self._free_at = max(self._free_at, now - _BURST_SECONDS) + size / self._rate
            left = self._free_at - now
        return not stop.wait(max(left, 0.0))
