"""One file on its way from a guest to this host."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from stratabox.client._file_requests import file_info
from stratabox.client.errors import InvalidArchiveError
from stratabox.client.file_records import CopyResult, FileInfo
from stratabox.v1 import files_pb2 as pb

Progress = Callable[[int, int], None]


class Arriving:
    """A file on its way in: aside, and renamed when it is whole. A device or pipe as it comes."""

    def __init__(self, target: Path, limit: int | None, progress: Progress | None) -> None:
        target = target.resolve() if target.is_symlink() else target
        self._target, self._limit, self._progress = target, limit, progress
        self._aside: str | None = None
        self._file: BinaryIO | None = None
        self._info: FileInfo | None = None
        self._size = 0

    def step(self, message: pb.ReadFileResponse) -> None:
        """The next piece.

        :raise InvalidArchiveError: when there is more than may come.
        :raise OSError: when it cannot be written.
        """
        if message.WhichOneof("part") == "info":
            self._info = file_info(message.info)
            self._open()
            return
        assert self._file is not None
        assert self._info is not None
        self._size += len(message.data)
        if self._limit is not None and self._size > self._limit:
            raise InvalidArchiveError(f"the guest sends more than {self._limit} bytes")
        self._file.write(message.data)
        if self._progress is not None:
            self._progress(self._size, max(self._info.size, self._size))

    def finish(self) -> CopyResult:
        """All has come."""
        assert self._info is not None
        assert self._file is not None
        self._file.flush()
        if self._aside is not None:
            modified = self._info.modified_at.timestamp()
            os.fchmod(self._file.fileno(), self._info.mode & 0o777)
            os.utime(self._file.fileno(), (modified, modified))
            Path(self._aside).rename(self._target)
            self._aside = None
        return CopyResult(entries=1, size_bytes=self._size, warnings=(), incomplete=False)

    def close(self) -> None:
        """Whether it has or not; what lies aside is removed."""
        if self._file is not None:
            self._file.close()
        if self._aside is not None:
            with suppress(FileNotFoundError):
                Path(self._aside).unlink()

    def _open(self) -> None:
        if self._target.is_dir():
            raise IsADirectoryError(f"{self._target} is a folder")
        if self._target.exists() and not self._target.is_file():
            self._file = self._target.open("wb")
            return
        folder = self._target.parent
        if self._limit is None:
            self._limit = shutil.disk_usage(folder).free
        made, self._aside = tempfile.mkstemp(prefix=".stratabox.", dir=folder)
        self._file = os.fdopen(made, "wb")
