"""The audit log: who did what, when, and what came of it, as lines of JSON.

```
STATE_DIR/audit/calls.jsonl, calls.jsonl.1 … .7       calls that were let in; .7 is the oldest
STATE_DIR/audit/refused.jsonl, …                      tries that were not; bounded for themselves,
                                                      so that strangers cannot push out the first
```

A line is written by a thread of its own and handed to the system at once, without fsync: it is safe
from the daemon's end and not from a power cut. What cannot be written (the disk is full) or comes
faster than it can be is counted, and the count is the next line.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path

from stratabox.daemon.access.keys import redacted

log = logging.getLogger(__name__)

FILES = 8
"""Files of one log, the one that is written included."""
_PENDING = 10_000
"""Lines that may wait for the disk."""
_LONGEST = 8 << 10
"""Bytes of a line."""


class AuditLog:
    """One log. Close it: what was noted is written then.

    :param size: bytes that all its files may take together; 0: nothing is written.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._file_size = size // FILES
        self._lines: queue.Queue[bytes | None] = queue.Queue(_PENDING)
        # Each has one writer: lines that were not taken, lines that were not written, both as told.
        self._dropped = self._failed = self._told = 0
        self._descriptor: int | None = None
        self._bytes = 0
        self._thread: threading.Thread | None = None
        if size:
            self._thread = threading.Thread(target=self._write_all, name="audit", daemon=True)
            self._thread.start()

    def note(self, entry: Mapping[str, object]) -> None:
        """Write a line; never waits. Keys in it are cut down to their ids."""
        if self._thread is None:
            return
        text = redacted(json.dumps(entry, separators=(",", ":"), ensure_ascii=True))
        line = text.encode()
        if len(line) > _LONGEST:
            self._dropped += 1
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is noted, and end."""
        if self._thread is None:
            return
        self._lines.put(None)
        self._thread.join()
        self._thread = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write_all(self) -> None:
        failing = False
        while (line := self._lines.get()) is not None:
            try:
                if lost := self._dropped + self._failed - self._told:
                    self._append(b'{"lost":%d}' % lost)
                    self._told += lost
                self._append(line)
                failing = False
            except OSError as error:
                self._failed += 1
                if not failing:
                    log.error("the audit log %s cannot be written: %s", self._path, error)
                failing = True

    def _append(self, line: bytes) -> None:
        if self._descriptor is None:
            self._open()
        elif self._bytes + len(line) + 1 > self._file_size:
            self._rotate()
        assert self._descriptor is not None
        rest = memoryview(line + b"\n")
        try:
            while rest:
                written = os.write(self._descriptor, rest)
                self._bytes += written
                rest = rest[written:]
        except OSError:
            # Half a line would spoil the next one.
            os.ftruncate(self._descriptor, self._bytes - (len(line) + 1 - len(rest)))
            self._bytes -= len(line) + 1 - len(rest)
            raise

    def _rotate(self) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None
        for number in range(FILES - 1, 0, -1):
            older = self._numbered(number - 1)
            if older.exists():
                older.rename(self._numbered(number))
        self._open()

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._path, flags, 0o600)
        self._bytes = os.fstat(self._descriptor).st_size
        if self._bytes and os.pread(self._descriptor, 1, self._bytes - 1) != b"\n":
            # The daemon, or the host, ended in the middle of a line.
            self._bytes += os.write(self._descriptor, b"\n")

    def _numbered(self, number: int) -> Path:
        return self._path if number == 0 else self._path.with_name(f"{self._path.name}.{number}")
