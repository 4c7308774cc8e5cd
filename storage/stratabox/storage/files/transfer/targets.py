"""What an import writes: fresh files, whose every table and header is made here.

Each is a context manager that leaves nothing unless `finish` was called. Blocks come in order,
verified and of a possible size; what they hold is anybody's.
"""

from __future__ import annotations

import hashlib
import os
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from stratabox.storage.files import durable
from stratabox.storage.files.memory.format import PAGE, RamFile
from stratabox.storage.files.memory.writer import RamWriter
from stratabox.storage.files.transfer.archive import Unit, invalid
from stratabox.storage.files.transfer.manifest import Member
from stratabox.storage.qcow2.clusters import DATA
from stratabox.storage.qcow2.fresh import FreshDisk


class Target(Protocol):
    """One member that is being written."""

    def __enter__(self) -> Self:
        """It is open."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        """It is closed, and gone unless it was finished."""

    def put(self, number: int, states: memoryview, data: memoryview) -> None:
        """The next block. :raise NoSpaceError: NO_SPACE."""

    def finish(self) -> None:
        """All have come. :raise InvalidArgumentError: INVALID_ARCHIVE, if that is not true."""


class DiskTarget(FreshDisk):
    """A layer."""

    def put(self, number: int, states: memoryview, data: memoryview) -> None:
        """As `Target` says."""
        with durable.naming_a_full_disk():
            self.add(number * Unit.DISK.per_block, states, data)

    def finish(self) -> None:
        """As `Target` says; durable."""
        with durable.naming_a_full_disk():
            super().finish()


class RamTarget:
    """RAM, under an id of its own and standing alone."""

    def __init__(self, path: Path, *, id: str, ram_bytes: int) -> None:
        self._writer = RamWriter(path, id=id, parent=None, ram_bytes=ram_bytes)
        self.file: RamFile | None = None
        """Once it is finished."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def put(self, number: int, states: memoryview, data: memoryview) -> None:
        """As `Target` says."""
        page = number * Unit.RAM.per_block
        for state, group in groupby(states):
            count = sum(1 for _ in group)
            if state == DATA:
                self._writer.add(page, data[: count * PAGE])
                data = data[count * PAGE :]
            page += count

    def finish(self) -> None:
        """As `Target` says; durable."""
        self.file = self._writer.finish()


class FileTarget:
    """A whole file, which must have the SHA-256 that names it."""

    def __init__(self, path: Path, member: Member) -> None:
        self._path, self._member = path, member
        self._hash = hashlib.sha256()
        self._size = 0
        self._finished = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)
        if not self._finished:
            self._path.unlink(missing_ok=True)

    def put(self, number: int, states: memoryview, data: memoryview) -> None:
        """As `Target` says."""
        self._hash.update(data)
        self._size += len(data)
        with durable.naming_a_full_disk():
            while data:
                data = data[os.write(self._descriptor, data) :]

    def finish(self) -> None:
        """As `Target` says; durable."""
        if self._size != self._member.size or self._hash.hexdigest() != self._member.sha256:
            raise invalid(f"{self._member.kind} {self._member.sha256} is something else")
        with durable.naming_a_full_disk():
            os.fsync(self._descriptor)
        self._finished = True


class Nowhere:
    """For a member that is verified and not taken."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def put(self, number: int, states: memoryview, data: memoryview) -> None:
        """As `Target` says."""

    def finish(self) -> None:
        """As `Target` says."""
