"""Unix sockets in folders of any depth.

A Unix socket's address holds 108 bytes, and state folders can be deeper than that. So the folder
is opened and the address goes through ``/proc/self/fd``. Used by the launchers (listen), by the
monitor and by the agent (connect).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

MONITOR = "qmp.sock"
RESCUE = "rescue.sock"
AGENT = "agent.sock"
CHANNELS = ("ssh0.sock", "ssh1.sock")
EXEC = "exec.sock"
CONSOLE = "console.sock"
NETWORK = "net.sock"
ALL = (MONITOR, RESCUE, AGENT, *CHANNELS, EXEC, CONSOLE, NETWORK)

_BACKLOG = 8


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def listen(folder: Path, name: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Make a listening socket `name` in `folder`, mode 0600; one that lies there is replaced.

    :raise OSError: as bind does.
    """
    with _opened(folder) as directory:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
        sock = socket.socket(socket.AF_UNIX, kind)
        try:
            sock.bind(f"/proc/self/fd/{directory}/{name}")
            os.chmod(name, 0o600, dir_fd=directory)  # before listen: nobody can have come in
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock


def connect(folder: Path, name: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Connect to `name` in `folder`; never blocks. The socket is non-blocking.

    :raise OSError: when nobody listens, or the queue of those who wait is full.
    """
    with _opened(folder) as directory:
        sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
        try:
            sock.connect(f"/proc/self/fd/{directory}/{name}")
        except BaseException:
            sock.close()
            raise
        return sock


def remove(folder: Path) -> None:
    """Remove a domain's sockets; those that are gone already do not matter."""
    for name in ALL:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (folder / name).unlink()
