"""What a QEMU is restored from: files that exist in memory alone and that nobody can change.

A sealed memfd (memfd_create(2), fcntl(2): F_ADD_SEALS) can be mapped MAP_PRIVATE, also for
writing, by any number of processes, which share its pages until they write; no process can write
into it or change its size, whatever its uid and however it was opened.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from stratabox.storage.files import durable
from stratabox.storage.files.memory import packing
from stratabox.storage.files.memory.chain import OpenChain, Part, parts_of, resolve
from stratabox.storage.files.memory.format import PAGE
from stratabox.storage.model.errors import CorruptError
from stratabox.storage.model.ids import Sha256

STATE_BYTES = 64 << 20
"""A devices' state above this is not one: they have some hundred KB."""

_PORTION = 8
"""Chunks that a thread takes at a time."""
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def assemble(chain: OpenChain, *, verify: bool = False) -> int:
    """The RAM that a chain describes, as a sealed memfd with holes where it is zeros.

    :param verify: read all that the files hold, also what newer ones replace, and compare it with
        their sums. Without it only packed chunks are compared, with their own checksums.
    :return: its descriptor, which the caller closes.
    :raise CorruptError: RAM_CORRUPT, when a file is not what was written.
    :raise OSError: ENOMEM, ENOSPC, when the host's memory does not hold it.
    """
    parts: dict[tuple[int, int], list[Part]] = {}
    for piece in resolve(chain.files):
        if piece.file >= 0:
            for part in parts_of(piece, chain.files[piece.file]):
                parts.setdefault((part.file, part.chunk), []).append(part)
    if verify:
        for index, file in enumerate(chain.files):
            for chunk in range(len(file.stored)):
                parts.setdefault((index, chunk), [])
    descriptor = os.memfd_create("stratabox-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def put(portion: Sequence[tuple[int, int]]) -> None:
        for key in portion:
            if not verify and put_alone(parts[key]):
                continue
            with memoryview(chain.read(*key, verify=verify)) as pages:
                for part in parts[key]:
                    end = part.offset + part.count * PAGE
                    _pwrite_all(descriptor, pages[part.offset : end], part.first * PAGE)

    def put_alone(some: Sequence[Part]) -> bool:
        """Of old files little may be left: read no more than that, where it is not packed."""
        for part in some:
            data = chain.read_part(part)
            if data is None:
                return False
            _pwrite_all(descriptor, memoryview(data), part.first * PAGE)
        return True

    try:
        os.ftruncate(descriptor, chain.files[0].ram_bytes)
        order = sorted(parts)
        portions = [order[at : at + _PORTION] for at in range(0, len(order), _PORTION)]
        with packing.threads("assemble") as pool:
            try:
                for _ in pool.map(put, portions):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_sealed(descriptor: int, size: int) -> bool:
    """Tell whether it is a file of that size that nobody can change."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return seals & _SEALS == _SEALS and os.fstat(descriptor).st_size == size


def write_state(path: Path, state: bytes) -> Sha256:
    """Keep the devices' state, durably and read-only; nothing is left when this raises.

    :return: what `read_state` must be given.
    :raise NoSpaceError: NO_SPACE.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        with durable.naming_a_full_disk():
            data = memoryview(state)
            while data:
                data = data[os.write(descriptor, data) :]
            os.fchmod(descriptor, 0o400)
            os.fsync(descriptor)
            durable.sync_folder(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return Sha256(hashlib.sha256(state).hexdigest())


def read_state(path: Path, digest: Sha256) -> int:
    """The devices' state as a sealed memfd, checked; the caller closes the descriptor.

    :raise CorruptError: STATE_CORRUPT, when it is missing or not what was written. QEMU itself
        would run most damaged states without a word.
    """
    try:
        with path.open("rb") as file:
            state = file.read(STATE_BYTES + 1)
    except FileNotFoundError:
        raise _bad_state(path, "is missing") from None
    if hashlib.sha256(state).hexdigest() != digest:
        raise _bad_state(path, f"({len(state)} bytes) is not what was saved: its SHA-256 differs")
    descriptor = os.memfd_create("stratabox-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _pwrite_all(descriptor, memoryview(state), 0)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _bad_state(path: Path, what: str) -> CorruptError:
    return CorruptError(
        f"the devices' saved state {path.name} {what}", reason="STATE_CORRUPT", file=path.name
    )


def _pwrite_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done
