"""What is said to systemd, and the socket that it hands over: with real sockets and processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from stratabox.daemon.hypervisor.housing import HouseError
from stratabox.daemon.service import activation
from stratabox.daemon.service.activation import Relay
from stratabox.daemon.service.frames import PREFACE, Frames, Kind, goaway, ping
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
import fcntl, os, sys
high = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[2:]]
for number, descriptor in enumerate(high, 3):
    os.dup2(descriptor, number)
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
        descriptors = given.fileno(), useless.fileno()
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, whose, *map(str, descriptors)],
            env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
            pass_fds=descriptors,
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
    relay.close()
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


def test_frames_are_told_however_they_come() -> None:
    headers = b"\0\0\3\1\0\0\0\0\1abc"  # HEADERS that go on
    goes_on = b"\0\0\1\x09\4\0\0\0\1d"  # CONTINUATION, the last one
    data = b"\0\1\4\0\1\x80\0\0\3" + bytes(260)  # DATA, the stream's last; a reserved bit
    sent = PREFACE + headers + goes_on + ping(b"12345678") + data + goaway()
    frames = Frames(len(PREFACE))
    whole = frames.follow(sent)
    assert [(each.kind, each.stream) for each in whole] == [
        (Kind.HEADERS, 1), (Kind.PING, 0), (Kind.DATA, 3),
    ]  # fmt: skip
    assert [each.opens for each in whole] == [True, False, False]
    assert [each.closes for each in whole] == [False, False, True]
    assert whole[1].payload == b"12345678"
    assert frames.gap == len(PREFACE + headers + goes_on)
    assert frames.lets_others_in
    for size in (1, 2, 7, 9, 100, 200):
        frames = Frames(len(PREFACE))
        assert not frames.lets_others_in
        found, gaps = [], []
        for at in range(0, len(sent), size):
            found += frames.follow(sent[at : at + size])
            gaps += [] if frames.gap is None else [at + frames.gap]
        assert found == whole
        assert frames.lets_others_in
        assert size != 1 or gaps == [
            len(PREFACE) + 22, len(PREFACE) + 39, len(sent) - 17, len(sent),
        ]  # fmt: skip


@contextlib.asynccontextmanager
async def slow_api(path: Path) -> AsyncIterator[asyncio.Event]:
    """gRPC's server with one method, which answers once the event is set."""
    go_on = asyncio.Event()

    async def answer(request: bytes, context: object) -> bytes:
        await go_on.wait()
        return request

    server = grpc.aio.server()
    method: Any = grpc.unary_unary_rpc_method_handler(answer)
    handler = grpc.method_handlers_generic_handler("a.Service", {"Method": method})
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield go_on
    finally:
        await server.stop(None)


async def until(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not fact():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_clients_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have begun is waited for; their next call is the next relay's; who is mute, not."""
    monkeypatch.setattr(activation, "_HEARD_SECONDS", 0.2)
    outside = tmp_path / "out"
    with socket.socket(socket.AF_UNIX) as held, socket.socket(socket.AF_UNIX) as mute:
        held.bind(str(outside))
        held.listen()
        async with (
            slow_api(tmp_path / "one") as one,
            slow_api(tmp_path / "two") as two,
            grpc.aio.insecure_channel(f"unix:{outside}") as channel,
        ):
            method: Any = channel.unary_unary("/a.Service/Method")
            first = Relay(held.dup(), tmp_path / "one")
            first.start()
            mute.connect(str(outside))
            begun = asyncio.ensure_future(method(b"begun", wait_for_ready=True))
            await until(lambda: any(each.streams for each in first._connections.values()))
            first.close()
            finishing = asyncio.create_task(first.finish())
            await until(lambda: any(each.heard for each in first._connections.values()))
            assert not (await asyncio.wait((finishing, begun), timeout=1))[0]
            late = asyncio.ensure_future(method(b"late"))
            one.set()
            assert await begun == b"begun"
            await asyncio.wait_for(finishing, 60)
            assert not late.done()
            await first.stop()
            second = Relay(held.dup(), tmp_path / "two")
            second.start()
            two.set()
            assert await asyncio.wait_for(late, 60) == b"late"
            await second.stop()


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
