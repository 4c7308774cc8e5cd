"""The helper's process, its wire to QEMU, and the daemon's side of it; without a guest."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stratabox.daemon.config import load
from stratabox.daemon.doctor import guests as doctor
from stratabox.daemon.doctor.finding import Status
from stratabox.daemon.hypervisor import sockets
from stratabox.daemon.hypervisor.network import link, slirp, wire
from stratabox.daemon.hypervisor.network import uplink as uplinks
from stratabox.daemon.hypervisor.network.link import Link, LinkClosedError
from stratabox.daemon.hypervisor.network.routes import Routes
from stratabox.daemon.hypervisor.network.uplink import Uplink, require_library
from stratabox.storage.model.errors import DeniedError, FailedError
from stratabox.storage.model.network import Network, NetworkMode, network

PUBLIC = network(NetworkMode.EGRESS, ["public"])
ARP = bytes.fromhex(
    "ffffffffffff" "525400123456" "0806" "0001080006040001" "525400123456" "0a00020f"
    "000000000000" "0a000202"
)  # fmt: skip


def framed(frame: bytes) -> bytes:
    return len(frame).to_bytes(4, "big") + frame


def test_frames_come_in_pieces_and_whole() -> None:
    ours, theirs = socket.socketpair()
    with ours, contextlib.closing(Link(theirs)) as wired:
        assert list(wired.frames()) == []
        data = framed(b"one") + framed(b"") + framed(b"three")
        ours.sendall(data[:5])
        assert list(wired.frames()) == []
        ours.sendall(data[5:-1])
        assert list(wired.frames()) == [b"one", b""]
        ours.sendall(data[-1:])
        assert list(wired.frames()) == [b"three"]
        ours.sendall((link.MAX_LENGTH + 1).to_bytes(4, "big"))
        with pytest.raises(LinkClosedError):
            list(wired.frames())
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkClosedError):
            list(wired.frames())


def test_a_guest_that_stands_still_costs_little() -> None:
    ours, theirs = socket.socketpair()
    # What the kernel takes on top is the host's setting, else: many MiB on some.
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    with ours, contextlib.closing(Link(theirs)) as wired:
        taken = 0
        while wired.send(bytes(1500)):
            taken += 1
            wired.flush()
            assert taken < 10_000
        assert wired.waits
        ours.close()
        with pytest.raises(LinkClosedError):
            wired.flush()


def test_the_kernel_knows_the_hosts_addresses() -> None:
    with Routes() as routes:
        assert routes.is_host(0x7F000001)
        assert routes.is_host(0x7F123456)
        assert routes.is_host(0xFFFFFFFF)
        assert not routes.is_host(0x08080808), "or no route leads there"


def test_a_host_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    require_library()
    (fine,) = doctor.check_network(load([], {"HOME": "/home/ann"}))
    assert fine.status is Status.OK
    monkeypatch.setattr(slirp, "LIBRARY", "libnothing.so.0")
    with pytest.raises(DeniedError, match="install libslirp0") as refused:
        require_library()
    assert refused.value.reason == "NETWORK_UNAVAILABLE"
    (finding,) = doctor.check_network(load([], {"HOME": "/home/ann"}))
    assert finding.status is Status.WARN
    assert "libslirp0" in finding.remedy


@pytest.fixture
async def uplink(tmp_path: Path) -> AsyncIterator[Uplink]:
    started = Uplink.start("stratabox-unit-test", tmp_path, None)
    yield started
    await started.end()
    with pytest.raises(ProcessLookupError):
        os.kill(started.pid, 0)
    assert not (tmp_path / wire.CONTROL).exists()


async def test_a_helper_is_told_and_asked(
    uplink: Uplink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uplinks, "FIND_SECONDS", 60)
    with sockets.listen(tmp_path, wire.LINK) as listening:
        uplink.connect(PUBLIC)
        qemu, _ = listening.accept()
    with qemu:
        await uplink.up()
        qemu.sendall(framed(ARP))
        answer = await asyncio.to_thread(qemu.recv, 100)
        assert answer[4:10] == ARP[6:12], "the gateway is there"
        counters = await uplink.look()
        assert (counters.sent_packets, counters.received_packets) == (1, 1)
        with pytest.raises(FailedError, match="refuses") as refused:
            await uplink.change(Network(mode=NetworkMode.EGRESS, allow=("127.0.0.1",)))
        assert refused.value.reason == "NETWORK_FAILED"
        await uplink.change(PUBLIC)
        # The next daemon finds it, with all that it has counted.
        found = await Uplink.find("stratabox-unit-test", tmp_path)
        assert found is not None
        assert (found.pid, found.started) == (uplink.pid, uplink.started)
        assert dataclasses.astuple(await found.look()) == dataclasses.astuple(await uplink.look())
        found.let_go()
    async with asyncio.timeout(60):
        await uplink.gone()  # with its QEMU
    with pytest.raises(FailedError, match="has ended"):
        await uplink.look()
    assert await Uplink.find("stratabox-unit-test", tmp_path) is None


async def test_without_a_qemu_it_says_so(uplink: Uplink) -> None:
    with pytest.raises(FailedError, match="cannot be connected to QEMU"):
        uplink.connect(PUBLIC)
