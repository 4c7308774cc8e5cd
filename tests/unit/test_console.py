"""A console's bounds: what is kept, what followers lose, what a guest that does not read gets."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stratabox.client.cli.console import Escaper
from stratabox.daemon.hypervisor import console as console_module
from stratabox.daemon.hypervisor import sockets
from stratabox.daemon.hypervisor.console import GAP, RING_BYTES, Console, Limits
from stratabox.daemon.hypervisor.console_log import NAME, OLDER, PIECE_BYTES, ConsoleLog
from stratabox.storage.model.errors import UnavailableError

KIB = 1 << 10
FAST = Limits(rate=64 << 20, log=512 * KIB)


@asynccontextmanager
async def connected(
    folder: Path, limits: Limits = FAST, *, fresh: bool = True
) -> AsyncIterator[tuple[Console, socket.socket]]:
    """A console, and the other end of its socket."""
    with sockets.listen(folder, sockets.CONSOLE) as listening:
        console = Console(folder, limits)
        await console.open(fresh=fresh)
        assert console.is_open
        line, _ = listening.accept()
        with line:
            line.setblocking(False)
            try:
                yield console, line
            finally:
                await console.close()


async def say(line: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(line, data)


def test_a_log_keeps_the_newest_and_is_bounded(tmp_path: Path) -> None:
    log = ConsoleLog(tmp_path, 256 * KIB)
    assert log.read() == b""
    said = b""
    for number in range(100):
        piece = bytes([number]) * 10_000
        log.append(piece)
        said += piece
        kept = log.read()
        assert said.endswith(kept)
        assert min(len(said), 128 * KIB) <= len(kept) + 10_000
    sizes = [(tmp_path / name).stat().st_size for name in (NAME, OLDER)]
    assert sum(sizes) == len(log.read()) <= 256 * KIB
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_log_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        ConsoleLog(tmp_path, 256 * KIB).append(b"x")


async def test_what_is_said_is_kept_once_and_in_order(tmp_path: Path) -> None:
    said = b"".join(b"line %d\r\n" % number for number in range(20_000))
    async with connected(tmp_path) as (console, line):
        follower = console.follow(from_log=False)
        assert (await anext(follower)).data == b""
        saying = asyncio.create_task(say(line, said))
        heard = b""
        async for each in follower:
            assert each.lost == 0
            heard += each.data
            if len(heard) == len(said):
                break
        await saying
        assert heard == said
        assert await console.kept() == said
        assert console.tail().endswith("line 19999\n")
        await follower.aclose()
    assert ConsoleLog(tmp_path, FAST.log).read() == said


async def test_who_asks_for_what_is_kept_gets_all_without_a_gap(tmp_path: Path) -> None:
    ConsoleLog(tmp_path, FAST.log).append(b"0 ")
    async with connected(tmp_path) as (console, line):

        async def count() -> None:
            for number in range(1, 3000):
                await say(line, b"%d " % number)
                if number % 100 == 0:
                    await asyncio.sleep(0)

        async def listen() -> bytes:
            heard = b""
            async for each in console.follow(from_log=True):
                assert each.lost == 0
                heard += each.data
                if heard.endswith(b" 2999 "):
                    break
            return heard

        counting = asyncio.create_task(count())
        heard = await asyncio.gather(*(listen() for _ in range(3)))
        await counting
    assert set(heard) == {b"".join(b"%d " % number for number in range(3000))}


async def test_a_slow_follower_loses_the_oldest_and_is_told(tmp_path: Path) -> None:
    said = bytes(range(256)) * (5 * RING_BYTES // 256)
    async with connected(tmp_path) as (console, line):
        quick, follower = console.follow(from_log=False), console.follow(from_log=False)
        await anext(quick)
        await anext(follower)
        saying = asyncio.create_task(say(line, said))
        count = 0
        async for each in quick:
            count += each.lost + len(each.data)
            if count == len(said):
                break
        await saying
        await quick.aclose()
        first = await anext(follower)
        assert first.lost > 0
        heard = first.data
        while first.lost + len(heard) < len(said):
            heard += (await anext(follower)).data
        assert said.endswith(heard)
        assert first.lost + len(heard) == len(said)
        assert len(heard) <= 2 * RING_BYTES
        await follower.aclose()


async def test_followers_end_with_the_console(tmp_path: Path) -> None:
    async with connected(tmp_path) as (console, line):
        follower = console.follow(from_log=False)
        await anext(follower)
        await say(line, b"last words")
        await console.close()
        assert [each.data async for each in follower] == [b"last words"]
        assert not console.is_open
    assert ConsoleLog(tmp_path, FAST.log).read() == b"last words"


async def test_a_flood_is_slowed_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    size = 1024 * KIB
    began = time.monotonic()
    async with connected(tmp_path, Limits(rate=16 * KIB, log=256 * KIB)) as (console, line):
        follower = console.follow(from_log=False)
        await anext(follower)
        saying = asyncio.create_task(say(line, bytes(size)))
        heard = 0
        async for each in follower:
            heard += each.lost + len(each.data)
            if heard >= size:
                break
        await saying
        await follower.aclose()
    # What goes beyond the burst is to be waited for: 768 KiB at 16 KiB/s, less what has passed, and
    # the last piece, which is heard before it is waited for. (The flusher's pauses, of 0.2 s, are
    # among them.)
    passed = time.monotonic() - began
    assert max(pauses) >= (size - 256 * KIB - PIECE_BYTES) / (16 * KIB) - passed


async def test_what_was_missed_is_marked(tmp_path: Path) -> None:
    async with connected(tmp_path, fresh=False) as (console, line):
        assert await console.kept() == b""
        await say(line, b"before ")
        assert await console.kept() == b"before "
    for _ in range(2):
        async with connected(tmp_path, fresh=False) as (console, _line):
            # Its last words of before are known to a new daemon, too.
            assert console.tail().startswith("before")
            assert await console.kept() == b"before " + GAP


async def test_what_nobody_reads_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "WRITE_SECONDS", 0.2)
    async with connected(tmp_path) as (console, line):
        await console.write(b"hello")
        assert line.recv(100) == b"hello"
        with pytest.raises(UnavailableError) as caught:
            await console.write(bytes(1 << 20))
        assert caught.value.reason == "CONSOLE_NOT_READ"
        assert 0 < int(caught.value.metadata["written"]) < 1 << 20
        monkeypatch.setattr(console_module, "WRITE_SECONDS", 60)
        writing = asyncio.create_task(console.write(bytes(1 << 20)))
        await asyncio.sleep(0.05)
        await console.close()
        with pytest.raises(UnavailableError) as caught:
            await writing
        assert caught.value.reason == "CONSOLE_UNAVAILABLE"


async def test_a_domain_without_a_console_is_none(tmp_path: Path) -> None:
    console = Console(tmp_path, FAST)
    await console.open(fresh=False)
    assert not console.is_open
    assert console.tail() == ""
    with pytest.raises(UnavailableError):
        await console.write(b"x")
    await console.close()


async def test_a_log_that_cannot_be_written_hurts_nobody(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    async with connected(tmp_path) as (console, line):
        follower = console.follow(from_log=False)
        await anext(follower)
        await say(line, b"still heard")
        assert (await anext(follower)).data == b"still heard"
        assert console.tail() == "still heard"
        await follower.aclose()
        await console.close()
    assert (tmp_path / NAME).is_dir()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain\r\nlines\n\tand tabs", "plain\nlines\n\tand tabs"),
        (b"\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        (b"over\rwritten", "over\\rwritten"),
        (b"\xff\xfe\xc3\x28", "\\xff\\xfe\\xc3("),
        ("ünïcødé \u202e\u009b31m".encode(), "ünïcødé \\u202e\\x9b31m"),
        (b"end\r", "end\\r"),
    ],
)
def test_nothing_that_moves_a_terminal_gets_through(data: bytes, text: str) -> None:
    assert Escaper().take(data, final=True) == text
    slowly = Escaper()
    pieces = [slowly.take(bytes([byte])) for byte in data]
    assert "".join(pieces) + slowly.take(b"", final=True) == text
