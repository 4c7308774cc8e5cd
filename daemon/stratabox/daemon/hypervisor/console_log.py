"""What a guest wrote to its serial console, kept in two files of bounded size.

```
FOLDER/console.log.1   the older half, once there is one
FOLDER/console.log     the newer half, appended to
```

When the newer file would grow beyond half of the limit it becomes the older one, whose bytes are
gone. The bytes are the guest's own: whoever shows them to people escapes them. Everything here
blocks.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

NAME = "console.log"
OLDER = "console.log.1"
PIECE_BYTES = 64 << 10
"""`append` takes at most so many at once; half of the limit is no smaller."""


class ConsoleLog:
    """The log of the sandbox whose folder this is.

    :param limit: bytes that both files may have together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._half = max(limit // 2, PIECE_BYTES)

    def append(self, data: bytes) -> None:
        """Add at most `PIECE_BYTES`. :raise OSError: when the host cannot; then nothing is torn."""
        descriptor = self._open()
        try:
            if os.fstat(descriptor).st_size + len(data) > self._half:
                os.close(descriptor)
                descriptor = -1
                (self._folder / NAME).replace(self._folder / OLDER)
                descriptor = self._open()
            os.write(descriptor, data)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def read(self) -> bytes:
        """All that is kept, oldest first; b"" when nothing is."""
        kept = b""
        for name in (OLDER, NAME):
            with (
                contextlib.suppress(FileNotFoundError),
                (self._folder / name).open("rb") as file,
            ):
                kept += file.read(self._half)
        return kept

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._folder / NAME, flags, 0o600)
