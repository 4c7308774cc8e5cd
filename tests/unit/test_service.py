"""What is said to systemd, and the socket that it hands over: with real sockets and processes."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor.housing import HouseError
from stratabox.daemon.service.activation import Relay
from stratabox.daemon.service.notifying import Notifier
from stratabox.daemon.service.scopes import Scopes, manager_socket
from stratabox.storage.model.ids import SandboxId

ID = SandboxId("0" * 8)


def test_nobody_listens() -> None:
    notifier = Notifier({})
    notifier.tell("READY=1")


async def test_readiness_and_signs_of_life(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        environ = {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "20000",
            "WATCHDOG_PID": str(os.getpid()),
        }
        notifier = Notifier(environ)
        assert environ == {}  # no child may speak for the daemon
        notifier.tell("READY=1", "STATUS=x")
        assert manager.recv(100) == b"READY=1\nSTATUS=x"
        living = asyncio.create_task(notifier.live())
        for _ in range(3):
            assert await asyncio.to_thread(manager.recv, 100) == b"WATCHDOG=1"
        living.cancel()
        with pytest.raises(asyncio.CancelledError):
            await living


async def test_no_watchdog_is_wanted_of_us() -> None:
    await Notifier({"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}).live()
    await Notifier({}).live()


_CHILD = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid()) if sys.argv[1] == "ours" else "1"
from stratabox.daemon.service.activation import inherited
found = inherited(os.environ)
print(sorted(map(str, found)), [name for name in os.environ if name.startswith("LISTEN")])
print([os.get_inheritable(each.fileno()) for each in found.values()])
"""


@pytest.mark.parametrize("whose", ["ours", "others"])
def test_sockets_that_are_handed_over(whose: str, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as given, socket.socket() as useless:
        given.bind(str(path))
        given.listen()

        def place() -> None:
            high = [os.dup2(each.fileno(), 50 + n) for n, each in enumerate((given, useless))]
            for number, descriptor in enumerate(high):
                os.dup2(descriptor, 3 + number)

        done = subprocess.run(
            [sys.executable, "-c", _CHILD, whose],
            env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
            preexec_fn=place,
            close_fds=False,
            capture_output=True,
            text=True,
            check=True,
        )
    expected = [str(path)] if whose == "ours" else []
    assert done.stdout.splitlines() == [f"{expected} []", "[False]" if expected else "[]"]


async def test_connections_are_passed_on(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
        writer.write(b"end")
        writer.close()

    outside, inside = tmp_path / "out", tmp_path / "in"
    source = socket.socket(socket.AF_UNIX)
    source.bind(str(outside))
    source.listen()
    # Who comes before anybody takes connections waits.
    early = await asyncio.open_unix_connection(str(outside))
    server = await asyncio.start_unix_server(echo, inside)
    relay = Relay(source, inside)
    relay.start()
    late = await asyncio.open_unix_connection(str(outside))
    much = os.urandom(3 << 20)
    for reader, writer in (early, late):
        writer.write(much)
        writer.write_eof()
        assert await reader.read() == much + b"end"
        writer.close()
    held = await asyncio.open_unix_connection(str(outside))
    held[1].write(b"x")
    assert await held[0].read(1) == b"x"
    await relay.close()
    held[1].write(b"y")
    assert await held[0].read(1) == b"y"  # those that there are go on
    waiting = await asyncio.open_unix_connection(str(outside))
    await relay.stop()
    assert await held[0].read() == b""
    for _, writer in (held, waiting):
        writer.close()
    server.close()
    await server.wait_closed()
    assert outside.exists()


async def test_without_an_api_connections_end(tmp_path: Path) -> None:
    source = socket.socket(socket.AF_UNIX)
    source.bind(str(tmp_path / "out"))
    source.listen()
    relay = Relay(source, tmp_path / "nobody")
    relay.start()
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "out"))
    assert await reader.read() == b""
    writer.close()
    await relay.stop()


def test_whose_daemon_it_is() -> None:
    assert manager_socket({}) is None
    assert manager_socket({"SYSTEMD_EXEC_PID": "1"}) is None
    found = manager_socket({"SYSTEMD_EXEC_PID": str(os.getpid()), "XDG_RUNTIME_DIR": "/run/user/7"})
    expected = "/run/systemd" if os.geteuid() == 0 else "/run/user/7/systemd"
    assert found == Path(expected, "private")


async def test_a_manager_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HouseError, match=r"stratabox-guest-00000000-\d+\.scope: .*No such file"):
        await Scopes(tmp_path / "nobody", tmp_path).put("guest", ID, os.getpid(), None)
