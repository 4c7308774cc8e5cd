"""Saves and restores by the memory engine alone, without a daemon or a catalog."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stratabox.daemon.hypervisor.machine import ChainLayer, SavedMemory
from stratabox.daemon.hypervisor.memory import mapping
from stratabox.daemon.hypervisor.memory.reader import Buffer
from stratabox.daemon.hypervisor.memory.save import Base, Saved, Target, save
from stratabox.storage.files.memory.chain import OpenChain
from stratabox.storage.files.memory.sealed import assemble, read_state
from stratabox.storage.model.ids import mint
from support.bench import Bench, Running, running

PART = 4 << 20


@dataclass(frozen=True)
class Kept:
    """A snapshot: what was saved, and the disk's layers that belong to it."""

    saved: Saved
    disks: list[ChainLayer]


class Memories:
    """Takes snapshots of guests and starts guests from them."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench, self.folder = bench, folder

    def path(self, id: str) -> Path:
        return self.folder / f"{id}.ram"

    async def take(
        self,
        guest: Running,
        base: Base,
        also: Callable[[], Awaitable[None]] | None = None,
    ) -> Kept:
        """Take one; the guest's spec is brought up to date with its new overlay."""
        disk = guest.spec.disks[0]
        old, new = disk.chain[0], self.bench.overlay(disk.chain[0].path)
        id = mint()
        target = Target(id=id, ram=self.path(id), state=self.folder / f"{id}.state")
        await guest.domain.disks.prepare([new])

        async def switch() -> None:
            if also is not None:
                await also()
            await guest.domain.disks.switch([(old, new)])

        saved = await save(guest.domain, base, target, overlays=[old.path], at_pause=switch)
        kept = Kept(saved, list(disk.chain))
        chain = [new, *disk.chain]
        guest.spec = replace(guest.spec, disks=[replace(disk, chain=chain)])
        return kept

    def ram(self, kept: Kept) -> int:
        """A descriptor of a snapshot's RAM; the caller closes it."""
        file = kept.saved.file
        with OpenChain(file.id, self.path, file.ram_bytes) as chain:
            return assemble(chain)

    @asynccontextmanager
    async def restored(self, guest: Running, kept: Kept) -> AsyncIterator[Running]:
        """A new guest that goes on from a snapshot."""
        ram = self.ram(kept)
        state = read_state(self.folder / f"{kept.saved.file.id}.state", kept.saved.state_sha256)
        try:
            spec = self.bench.restored(guest.spec, SavedMemory(ram=ram, state=state), kept.disks)
            async with running(self.bench.launcher, spec) as restored:
                yield restored
        finally:
            os.close(ram)
            os.close(state)


async def differing_pages(guest: Running, ram: int) -> list[int]:
    """Pages of a stopped guest's RAM that are not as in a file."""
    path, size = await guest.domain.memory.ram_file()
    where = mapping.find(guest.pid, path, size)
    found = []
    page = mapping.PAGE
    with Buffer(PART) as buffer:
        for offset in range(0, size, PART):
            buffer.read(where, [(offset // page, PART // page)])
            expected = os.pread(ram, PART, offset)
            with buffer.view(0, PART) as view:
                if bytes(view) != expected:
                    found += [
                        (offset + at) // page
                        for at in range(0, PART, page)
                        if bytes(view[at : at + page]) != expected[at : at + page]
                    ]
    return found
