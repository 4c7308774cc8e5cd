"""A process gives up what it does not need, for good.

Called by a helper when all its code is loaded and before it has read a single byte from outside.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from pathlib import Path

LOG_BYTES = 64 << 10
"""What it may write into a file: its log."""
DESCRIPTORS = 1024
MEMORY_BYTES = 1 << 30
"""Of addresses, not of RAM: much of it is never touched."""

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446  # x86-64
_READ_FILE = 1 << 2


def confine(uid: int | None, readable: Path) -> None:
    """Become `uid`, unable to gain anything, to start a program, or to be looked into by that user.

    :param uid: also the group; None: stay who it is.
    :param readable: the file of the host that it reads now and then, whoever has written it anew;
        where the kernel has Landlock, no other file can be opened.
    :raise OSError: when the kernel refuses; then the process must not go on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for name, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, LOG_BYTES),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, DESCRIPTORS),
    ):
        hard = resource.getrlimit(name)[1]
        most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(name, (most, most))
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    # After the change of user: it would count for the old one.
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    # Root's went with the change of user; a daemon of another user may have some too.
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _done(libc.capset(header, (ctypes.c_uint32 * 6)()))
    # A QEMU that was taken over has the same uid.
    _prctl(libc, _PR_SET_DUMPABLE, 0)
    _keep_to(libc, readable)


def _keep_to(libc: ctypes.CDLL, readable: Path) -> None:
    version = libc.syscall(_SYS_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return  # a kernel without, or with it switched off
    files = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    # Of the network it is the way out. Abstract sockets and other processes are no part of it.
    handled = struct.pack("=3Q", files, 0, 3)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = _done(libc.syscall(_SYS_LANDLOCK_CREATE, handled, len(handled), 0))
    try:
        # Its folder: a file that takes its place is another one.
        real = readable.resolve().parent
        folder = os.open(real if real.is_dir() else readable.parent, os.O_PATH | os.O_CLOEXEC)
        try:
            rule = struct.pack("=Qi", _READ_FILE, folder)
            _done(libc.syscall(_SYS_LANDLOCK_ADD, rules, 1, rule, 0))
        finally:
            os.close(folder)
        _done(libc.syscall(_SYS_LANDLOCK_RESTRICT, rules, 0))
    finally:
        os.close(rules)


def _done(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    _done(libc.prctl(option, value, 0, 0, 0))
