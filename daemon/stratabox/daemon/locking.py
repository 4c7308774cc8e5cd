"""The state folder's lock: one daemon, or one command that changes what is in there, at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from stratabox.storage.files.layout import Layout
from stratabox.storage.model.errors import DeniedError

_PID_BYTES = 32
"""Always so many, so that a full disk has had room for them since the first time."""


@contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """Hold the state folder for this process alone.

    :raise DeniedError: STATE_DIR_IN_USE.
    :raise OSError: when the lock's file cannot be made or written.
    """
    descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, _PID_BYTES, 0).decode("ascii", "replace").strip()
            raise DeniedError(
                f"another daemon (pid {holder or 'unknown'}) has the state folder {layout.root}:"
                " end it, or use another state_dir",
                reason="STATE_DIR_IN_USE",
                state_dir=layout.root,
                pid=holder,
            ) from error
        os.pwrite(descriptor, f"{os.getpid()}\n".ljust(_PID_BYTES).encode(), 0)
        yield
    finally:
        os.close(descriptor)
