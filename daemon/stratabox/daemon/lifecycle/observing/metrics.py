"""What sandboxes use of the host, at one time or again and again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from stratabox.daemon.hypervisor import usage
from stratabox.daemon.hypervisor.machine import DomainHandle
from stratabox.daemon.hypervisor.network.walls import Counters
from stratabox.daemon.hypervisor.usage import DiskUsage, MemoryShares, ProcessUsage
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes, space
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import InvalidArgumentError, NotFoundError, StrataboxError
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Sandbox

SHORTEST, LONGEST = 0.2, 3600.0
"""Seconds from one sample to the next, when they are streamed."""
MEASURE_SECONDS = 0.2
"""Over which the share of the CPUs is measured for a single sample."""
_MEMORY_SHARE = 0.02
"""Of a CPU, that may go into looking through one process's memory."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What one sandbox uses."""

    sandbox: Sandbox
    own_bytes: int
    process: ProcessUsage | None = None
    cpu_share: float | None = None
    """Of one CPU, since the sample before; None: there was none."""
    memory: MemoryShares | None = None
    disks: Sequence[DiskUsage] = ()
    network: Counters | None = None
    """None: it has no way out, or that does not answer."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some sandboxes at one time."""

    time: datetime
    sandboxes: Sequence[Metrics]
    handles: dict[SandboxId, DomainHandle] = field(repr=False)


class Meter:
    """Looks at sandboxes. One for all who ask."""

    def __init__(self, world: World, guests: Guests) -> None:
        self._world = world
        self._guests = guests
        self._memory: dict[DomainHandle, tuple[float, MemoryShares | None]] = {}
        """Of each process: when it may be looked through again, and what was seen last."""

    async def once(self, references: Sequence[str]) -> Sample:
        """One sample, with the share of the CPUs over a fifth of a second.

        :param references: none: all that have a process.
        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise DeniedError: AMBIGUOUS_NAME.
        """
        wanted = await self._resolve(references)
        before = await self._processes(await self._records(wanted))
        await asyncio.sleep(MEASURE_SECONDS)
        return _with_shares(await self._sample(wanted), before)

    async def again(self, references: Sequence[str], every: float) -> AsyncGenerator[Sample, None]:
        """A sample every so many seconds, for as long as the caller reads.

        :raise NotFoundError, DeniedError: as `once`, before the first.
        :raise InvalidArgumentError: INVALID_ARGUMENT, for an interval that cannot be.
        """
        if not SHORTEST <= every <= LONGEST:
            raise InvalidArgumentError(
                f"an interval of {every:g} s is not within {SHORTEST:g}-{LONGEST:g} s",
                field="interval",
            )
        wanted = await self._resolve(references)
        before: dict[DomainHandle, ProcessUsage] = {}
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            sample = _with_shares(await self._sample(wanted), before)
            before = {
                sample.handles[each.sandbox.id]: each.process
                for each in sample.sandboxes
                if each.process is not None
            }
            yield sample
            # What was missed, as by a caller who did not read, is not made up for.
            due = max(due + every, loop.time())
            await asyncio.sleep(due - loop.time())

    async def _resolve(self, references: Sequence[str]) -> list[SandboxId] | None:
        if not references:
            return None
        return await self._world.read(
            lambda tx: list(dict.fromkeys(sandboxes.resolve(tx, each) for each in references))
        )

    async def _records(self, wanted: Sequence[SandboxId] | None) -> list[Sandbox]:
        return await self._world.read(lambda tx: _records(tx, wanted))

    async def _sample(self, wanted: Sequence[SandboxId] | None) -> Sample:
        world = self._world

        def look(tx: Transaction) -> tuple[list[Sandbox], list[int]]:
            records = _records(tx, wanted)
            takes = space.of_sandboxes(tx, records, world.taken, world.known_chains)
            return records, [each.own for each in takes]

        records, own = await world.read(look)
        handles = self._handles(records)
        processes = await self._processes(records)
        memory = await in_thread(self._memories, list(handles.values()))
        answers = await asyncio.gather(*(self._ask(record.id) for record in records))
        found = []
        for record, own_bytes, (used, network) in zip(records, own, answers, strict=True):
            handle = handles.get(record.id)
            process = processes.get(handle) if handle else None
            found.append(
                Metrics(
                    sandbox=record,
                    own_bytes=own_bytes,
                    process=process,
                    memory=memory.get(handle) if handle and process else None,
                    disks=used if process else (),
                    network=network if process else None,
                )
            )
        return Sample(time=datetime.now(UTC), sandboxes=found, handles=handles)

    def _handles(self, records: Sequence[Sandbox]) -> dict[SandboxId, DomainHandle]:
        found = {}
        for record in records:
            domain = self._guests.of(record.id).domain if record.has_process else None
            if domain is not None:
                found[record.id] = domain.handle
        return found

    async def _processes(self, records: Sequence[Sandbox]) -> dict[DomainHandle, ProcessUsage]:
        handles = list(self._handles(records).values())

        def look() -> dict[DomainHandle, ProcessUsage]:
            used = ((each, usage.process_usage(each.pid, each.started)) for each in handles)
            return {each: found for each, found in used if found is not None}

        return await in_thread(look)

    def _memories(self, handles: Sequence[DomainHandle]) -> dict[DomainHandle, MemoryShares | None]:
        """Look through each process's memory, where that is due. In a thread."""
        kept = {each: found for each, found in self._memory.items() if each in handles}
        for handle in handles:
            begun = time.monotonic()
            if kept.get(handle, (0.0, None))[0] <= begun:
                found = usage.memory_shares(handle.pid)
                ended = time.monotonic()
                kept[handle] = ended + (ended - begun) / _MEMORY_SHARE, found
        self._memory = kept
        return {handle: kept[handle][1] for handle in handles}

    async def _ask(self, sandbox: SandboxId) -> tuple[Sequence[DiskUsage], Counters | None]:
        """What its QEMU and its network know; nothing of one that is just ending, or silent."""
        guest = self._guests.of(sandbox)
        disks: Sequence[DiskUsage] = ()
        network: Counters | None = None
        if guest.domain is not None:
            with contextlib.suppress(StrataboxError):
                disks = await guest.domain.disk_usage()
            with contextlib.suppress(StrataboxError):
                network = await guest.wiring.counters()
        return disks, network


def _records(tx: Transaction, wanted: Sequence[SandboxId] | None) -> list[Sandbox]:
    if wanted is None:
        found = [sandboxes.get(tx, each) for each in sandboxes.memory_in_use(tx)]
        found = [each for each in found if each.has_process and tx.sees(each.workspace)]
    else:
        found = []
        for each in wanted:
            with contextlib.suppress(NotFoundError):
                found.append(sandboxes.get(tx, each))
    return sorted(found, key=lambda each: (each.name, each.id))


def _with_shares(sample: Sample, before: dict[DomainHandle, ProcessUsage]) -> Sample:
    def share(each: Metrics) -> float | None:
        handle = sample.handles.get(each.sandbox.id)
        old = before.get(handle) if handle else None
        if old is None or each.process is None or each.process.at <= old.at:
            return None
        return max(0.0, each.process.cpu - old.cpu) / (each.process.at - old.at)

    found = [replace(each, cpu_share=share(each)) for each in sample.sandboxes]
    return replace(sample, sandboxes=found)
