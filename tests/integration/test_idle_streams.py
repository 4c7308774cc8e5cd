"""Streams on which nothing happens for long, whose keys change under them, whose way breaks off.

The daemon runs in here, so that its clock can be moved; the guest is a real one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import asyncssh
import pytest
import pytest_asyncio

from stratabox.client import AsyncClient, AsyncSandbox, StrataboxError, _access
from stratabox.client._process_faces import AsyncProcess
from stratabox.daemon import config
from stratabox.daemon.app import running
from stratabox.daemon.hypervisor.guest import channel
from support import doors
from support.daemon import DaemonProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")
HOURS = 3
STEP = 300
"""Seconds by which the clock is moved at once."""


class Clock:
    """What the event loop and all who wait in it count by; it only ever goes forward."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._ahead, self._real = 0.0, time.monotonic
        patch.setattr(time, "monotonic", lambda: self._real() + self._ahead)

    async def pass_by(self, seconds: float) -> None:
        """So much time passes, and all that is due in it is done."""
        for _ in range(int(seconds / STEP)):
            self._ahead += STEP
            for _ in range(20):
                await asyncio.sleep(0)


@dataclass
class Lab:
    """A daemon in here with one guest, and how it is reached by TCP."""

    client: AsyncClient
    box: AsyncSandbox
    port: int
    key: str
    clock: Clock


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """One for all of these."""
    port = doors.free_port()
    process = DaemonProcess(
        tmp_path_factory.mktemp("idle"),
        {"STRATABOX_LISTEN": f"http://127.0.0.1:{port}", "STRATABOX_KEEPALIVE": "2s"},
    )
    settings = config.load([], process.environment)
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        patch.setattr(channel, "_REKEY_BYTES", 256 << 10)
        async with running(settings), AsyncClient(process.address) as client:
            made = await asyncio.to_thread(doors.key, process, "create", "--role", "user")
            await client.images.build_tiny()
            async with await client.sandboxes.create(image="tiny", memory=128) as box:
                yield Lab(client, box, port, made["key"], clock)


@contextmanager
def keys_changed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """When the daemon's end began to agree on other keys with a guest."""
    times: list[float] = []
    begin = asyncssh.SSHClientConnection._send_kexinit

    def noted(self: asyncssh.SSHClientConnection) -> None:
        times.append(time.monotonic())
        begin(self)

    with monkeypatch.context() as patch:
        patch.setattr(asyncssh.SSHClientConnection, "_send_kexinit", noted)
        yield times


async def echoed(process: AsyncProcess, data: bytes) -> bytes:
    """What `cat` says to that."""
    await process.write(data)
    got = bytearray()
    async with asyncio.timeout(60):
        async for printed in process:
            got += printed.data
            if len(got) >= len(data):
                break
    return bytes(got)


async def test_three_hours_of_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async with await lab.box.spawn(["cat"], stdin=True) as process:
        assert await echoed(process, b"before\n") == b"before\n"
        with keys_changed(monkeypatch) as times:
            await lab.clock.pass_by(HOURS * 3600)
            assert await echoed(process, b"after\n") == b"after\n"
            assert times  # once an hour, where something is sent
        await process.close_stdin()
        assert (await process.wait()).ok


async def test_keys_that_change_under_streams(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = bytes(range(256)) * 4096  # 1 MiB
    async with await lab.box.spawn(["cat"], stdin=True) as idle:
        assert await echoed(idle, b"1") == b"1"
        with keys_changed(monkeypatch) as times:
            async with await lab.box.spawn(["cat"], stdin=True) as busy:
                out, err = await busy.communicate(sent)
            assert (out, err) == (sent, b"")
            assert len(times) >= 3
        assert await echoed(idle, b"2") == b"2"


class Way:
    """A way to the daemon that can fall silent, as one through a NAT that has forgotten it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Way:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def fall_silent(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._open.clear()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        for source, target in ((reader, back), (there, writer)):
            self._tasks.append(asyncio.create_task(self._carry(source, target)))

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._open.wait()
                target.write(data)
        finally:
            target.close()


async def test_a_way_that_falls_silent_ends_the_call_at_both_ends(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        _access,
        "KEEPALIVE_OPTIONS",
        (
            ("grpc.keepalive_time_ms", 4000),  # the daemon takes none oftener than its own
            ("grpc.keepalive_timeout_ms", 3000),
            ("grpc.http2.ping_timeout_ms", 3000),
            ("grpc.http2.max_pings_without_data", 0),
        ),
    )
    async with (
        Way(lab.port) as way,
        AsyncClient(f"http://127.0.0.1:{way.port}", api_key=lab.key) as afar,
    ):
        box = await afar.sandboxes.get(lab.box.id)
        async with await box.spawn("echo up; exec sleep 77777") as process:
            assert (await anext(aiter(process))).data == b"up\n"
            assert (await lab.box.execute("pidof sleep")).exit_code == 0
            way.fall_silent()
            with pytest.raises(StrataboxError):
                async with asyncio.timeout(60):
                    await process.wait()
            async with asyncio.timeout(60):
                while (await lab.box.execute("pidof sleep")).exit_code == 0:
                    pass
