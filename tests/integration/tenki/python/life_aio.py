"""The whole life of sandboxes with Tenki's own package and asyncio. Run by test_sdks, as a process
of its own. argv: a snapshot to begin with.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import tenki
from tenki import AsyncClient, AsyncSandbox

MIB = 1 << 20


@contextmanager
def raises(kind: type[Exception], words: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if type(error) is not kind or words not in str(error):
            raise
    else:
        raise AssertionError(f"no {kind.__name__}")


async def sh(box: AsyncSandbox, line: str) -> str:
    return (await box.exec("sh", "-c", line, check=True)).stdout_text.strip()


async def commands(box: AsyncSandbox) -> None:
    result = await box.exec("sh", "-c", "echo out; echo err >&2; exit 3")
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    many = await asyncio.gather(*(sh(box, f"echo {number}") for number in range(8)))
    assert many == [str(number) for number in range(8)]

    process = await box.start("sh", "-c", "read line; echo got $line; cat; exit 4")
    assert await process.pid()
    await process.write_stdin("a word\nmore")
    await process.close_stdin()
    ended = await process.wait(60)
    assert (ended.exit_code, ended.stdout) == (4, b"got a word\nmore")

    process = await box.start("sleep", "1000")
    assert await process.pid()
    await process.signal("SIGTERM")
    assert (await process.wait(60)).signal == "terminated"
    assert (await box.exec("sleep", "1000", timeout=1)).timed_out


async def files(box: AsyncSandbox) -> None:
    await box.fs.write_text("notes.txt", "a\n")
    assert await box.fs.read_text("/home/tenki/notes.txt") == "a\n"
    assert (await box.fs.stat("notes.txt")).size == 2
    await box.fs.mkdir("folder")
    assert [each.is_dir for each in await box.fs.list(".") if each.path.endswith("folder")] == [
        True
    ]
    await box.fs.remove("folder")
    with raises(tenki.FileNotFoundError):
        await box.fs.list("folder")
    data = bytes(range(256)) * (MIB // 128)

    async def pieces() -> object:
        for at in range(0, len(data), MIB):
            yield data[at : at + MIB]

    await box.fs.write_stream("big", pieces())
    assert b"".join([each async for each in box.fs.read_stream("big")]) == data


async def snapshots(client: AsyncClient, box: AsyncSandbox) -> None:
    pid = await sh(box, "sleep 100000 >/dev/null 2>&1 </dev/null & echo $!")
    snapshot = await box.snapshot(name="async")
    assert snapshot.state == "READY"
    copies = await asyncio.gather(
        *(client.create(snapshot_id=snapshot.id, name=f"copy-{number}") for number in range(2))
    )
    for copy in copies:
        await sh(copy, f"kill -0 {pid}")
        await copy.close()
    assert snapshot.id in {each.id for each in await client.snapshots.list()}
    await client.snapshots.delete(snapshot.id)
    with raises(tenki.SnapshotNotFoundError, snapshot.id):
        await client.snapshots.get(snapshot.id)


async def pausing(box: AsyncSandbox) -> None:
    await box.pause_async()
    await box.wait_paused(300)
    with raises(tenki.InvalidStateError, "state = PAUSED"):
        await box.fs.read_text("notes.txt")
    await box.resume()
    assert await box.fs.read_text("notes.txt") == "a\n"


async def volumes(client: AsyncClient, box: AsyncSandbox) -> None:
    volume = await client.volumes.create(name="async", size_bytes=16 * MIB)
    await box.attach_volume(volume.id, "/data")
    await sh(box, "echo kept >/data/file && sync")
    with raises(tenki.VolumeInUseError):
        await client.volumes.delete(volume.id)
    await box.detach_volume(volume.id)
    await client.volumes.delete(volume.id)


async def errors(client: AsyncClient) -> None:
    nobody = str(uuid.uuid4())
    with raises(tenki.SessionNotFoundError):
        await client.get(nobody)
    with raises(tenki.SnapshotNotFoundError, nobody):
        await client.create(snapshot_id=nobody)
    with raises(tenki.VolumeNotFoundError, nobody):
        await client.volumes.get(nobody)


async def main() -> None:
    async with (
        AsyncClient() as client,
        await client.create(snapshot_id=sys.argv[1], name="life-aio") as box,
    ):
        await commands(box)
        await files(box)
        await snapshots(client, box)
        await pausing(box)
        await volumes(client, box)
        await errors(client)
        assert box.id in {each.id for each in await client.list()}
    assert box.state == "TERMINATED"
    async with AsyncClient() as client:
        assert (await client.get(box.id)).state == "TERMINATED"


asyncio.run(main())
