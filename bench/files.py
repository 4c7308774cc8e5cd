"""A file into a guest, and out of it: as many bytes a second as the bare transport carries?

The bare transport is the same socket of the same guest and the same library, without a daemon and
without the API: one command each, ``cat``, whose input or output is the file. What goes out is on
the guest's disk before, for both: ext4 writes a file back at once that takes another's place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from bench.bench import Bench
from bench.figures import Figure
from bench.product import Product
from bench.rounds import Stopwatch, alternate, medians
from stratabox.client import Sandbox
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.guest.channel import Channel
from stratabox.storage.files.layout import Layout

SIZE = 64 << 20
PIECE = 256 << 10
SHARE = 0.8
"""Of the bare transport's bytes a second that files must have."""


def both_ways(bench: Bench) -> Iterator[Figure]:
    """64 MiB that no compression makes smaller, through the SDK and through the transport alone."""
    with bench.new_product() as made:
        sandbox = made.client.sandboxes.create(image="tiny", memory=256)
        content = bytes(range(251)) * (PIECE // 251 + 1)
        samples = alternate(
            min(bench.rounds, 5),
            {
                "ours": lambda: _ours(made, sandbox, content[:PIECE]),
                "bare": lambda: _bare(made, sandbox, content[:PIECE]),
            },
        )
    median = medians(samples)
    for way, name in (("in", "file into a guest"), ("out", "file out of a guest")):
        ours, bare = median[f"ours.{way}"], median[f"bare.{way}"]
        yield Figure(
            name=f"{name}, over the bare transport",
            unit="ms/MB",
            bound=f"≥ {SHARE:.0%} of its bytes a second",
            measured=ours,
            floor=bare,
            limit=bare / SHARE,
            note=f"{1000 / ours:.1f} against {1000 / bare:.1f} MB/s, {SIZE >> 20} MiB",
            samples={key: value for key, value in samples.items() if key.endswith(f".{way}")},
        )


def _ours(made: Product, sandbox: Sandbox, piece: bytes) -> Mapping[str, float]:
    files = made.client.sandboxes.get(sandbox.id).files
    files.write("/file", b"")  # connects, which is not what is measured
    watch = Stopwatch()
    info = files.write("/file", (piece for _ in range(SIZE // PIECE)))
    into = watch.ms
    assert info.size == SIZE
    made.client.sandboxes.execute(sandbox.id, "sync").check()
    watch = Stopwatch()
    count = sum(map(len, files.stream("/file")))
    assert count == SIZE
    return {"in": into / (SIZE / 1e6), "out": watch.ms / (SIZE / 1e6)}


def _bare(made: Product, sandbox: Sandbox, piece: bytes) -> Mapping[str, float]:
    made.stop()
    try:
        return asyncio.run(_transport(made, sandbox, piece))
    finally:
        made.start({})


async def _transport(made: Product, sandbox: Sandbox, piece: bytes) -> Mapping[str, float]:
    async with connection(made, sandbox) as carried:
        watch = Stopwatch()
        options: dict[str, Any] = {"encoding": None, "window": 2 << 20, "max_pktsize": 64 << 10}
        async with carried.create_process("cat >/bare", **options) as process:
            for _ in range(SIZE // PIECE):
                process.stdin.write(piece)
                await process.stdin.drain()
            process.stdin.write_eof()
            await process.wait(check=True)
        into = watch.ms
        await carried.run("sync", check=True)
        watch = Stopwatch()
        count = 0
        async with carried.create_process("cat /bare", **options) as process:
            while data := await process.stdout.read(PIECE):
                count += len(data)
        assert count == SIZE
        return {"in": into / (SIZE / 1e6), "out": watch.ms / (SIZE / 1e6)}


@asynccontextmanager
async def connection(made: Product, sandbox: Sandbox) -> Any:
    """The channel of a guest whose daemon has ended, by itself."""
    layout = Layout(made.state)
    folder = layout.sandbox(sandbox.id)  # type: ignore[arg-type]  # an id is a str
    agent = GuestAgent(folder)
    channel = Channel(folder, layout.channel_keys, agent, exists=True)
    try:
        yield await channel.connection()
    finally:
        await channel.close()
        await agent.close()
