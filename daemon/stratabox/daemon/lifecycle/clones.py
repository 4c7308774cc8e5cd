"""Clone: snapshot and restore in one, N copies at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.common.once import Flights, Key
from stratabox.daemon.lifecycle.common.threads import settle
from stratabox.daemon.lifecycle.creation import NewSandbox
from stratabox.daemon.lifecycle.policy import Resources
from stratabox.daemon.lifecycle.running import probing
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.sandboxes import Sandboxes
from stratabox.daemon.lifecycle.saving import is_readable
from stratabox.daemon.lifecycle.snapshots import NewSnapshot, Snapshots
from stratabox.daemon.lifecycle.volumes import claims
from stratabox.daemon.lifecycle.volumes.claims import Wish
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import operations, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.failpoints import hit
from stratabox.storage.files.durable import host_error
from stratabox.storage.model.errors import InvalidArgumentError, NotFoundError, StrataboxError
from stratabox.storage.model.ids import SandboxId, SnapshotId, mint
from stratabox.storage.model.network import Network
from stratabox.storage.model.probes import Probe
from stratabox.storage.model.records import Sandbox, Snapshot
from stratabox.storage.model.states import Identity, Level, SnapshotState

TURN_SECONDS = 2.0
"""Until the next copy is begun although one is not ready: ten times what it should take."""


@dataclass(frozen=True, kw_only=True)
class NewClone:
    """What to copy, and how often."""

    count: int = 1
    name: str = ""
    snapshot_name: str = ""
    resources: Resources = field(default_factory=Resources)
    env: Mapping[str, str] = field(default_factory=dict)
    level: Level | None = None
    identity: Identity | None = None
    """Who the copies are; None: somebody new each."""
    paused: bool = False
    volumes: Sequence[Wish] = ()
    """Each copy gets them; so several copies can only read them."""
    network: Network | None = None
    """What the copies may reach; None: what the source may."""
    probe: Probe | None = None
    """What must pass before a copy is ready; None: the source's."""
    ready_timeout: float | None = None
    """Seconds to wait until each copy is ready; None: do not wait."""


@dataclass(frozen=True, kw_only=True)
class Cloned:
    """The snapshot, and for each copy the sandbox or why there is none."""

    snapshot: Snapshot
    copies: Sequence[Sandbox | StrataboxError]


class Clones:
    """Makes copies of a sandbox as it is now."""

    def __init__(
        self,
        world: World,
        guests: Guests,
        flights: Flights,
        sandboxes_: Sandboxes,
        snapshots_: Snapshots,
    ) -> None:
        self._world = world
        self._guests = guests
        self._flights = flights
        self._sandboxes = sandboxes_
        self._snapshots = snapshots_

    async def clone(self, reference: str, wanted: NewClone, key: Key | None = None) -> Cloned:
        """Capture the sandbox now and restore that `count` times, side by side.

        When every copy fails, or the last caller goes, snapshot and copies are removed.

        :raise InvalidArgumentError: INVALID_RESOURCES, INVALID_ARGUMENT.
        :raise StrataboxError: what a snapshot raises; the first copy's error when all fail.
        """
        if wanted.count not in policy.COUNT:
            raise InvalidArgumentError(
                f"count {wanted.count} is not within {policy.COUNT[0]}-{policy.COUNT[-1]}",
                field="count",
            )
        policy.check_resources(wanted.resources)
        if wanted.resources.storage is not None:
            raise InvalidArgumentError(
                "a clone inherits its storage from the source", reason="INVALID_RESOURCES",
                field="storage",
            )  # fmt: skip
        policy.check_env(wanted.env)
        claims.check(wanted.volumes)
        if wanted.probe:
            probing.check(wanted.probe)
        last = f"{wanted.name}-{wanted.count}" if wanted.name and wanted.count > 1 else wanted.name
        for name in (last, wanted.snapshot_name):
            if name:
                policy.check_name(name)
        return await self._flights.join(
            key,
            lambda: self._clone(reference, wanted, key),
            name="clone",
            outlives_callers=False,
        )

    async def _clone(self, reference: str, wanted: NewClone, key: Key | None) -> Cloned:
        before = await self._world.read(lambda tx: key.recall(tx) if key else None)
        if before is not None:
            return await self._again(before)
        operation = Operation(kind=Kind.CLONE, snapshot=SnapshotId(mint()))
        assert operation.snapshot is not None
        new = NewSnapshot(
            id=operation.snapshot,
            name=wanted.snapshot_name,
            level=wanted.level or await self._best_level(reference, wanted),
        )
        copies: list[asyncio.Task[Sandbox]] = []
        try:
            await self._world.write(lambda tx: operations.begin(tx, operation))
            # A snapshot outlives its callers: who gives up waits for it, to remove it then.
            snapshot = await settle(self._snapshots.create(reference, new))
            hit("clone.snapshot-taken")
            copies = [
                asyncio.create_task(self._copy(snapshot, wanted, number))
                for number in range(1, wanted.count + 1)
            ]
            await asyncio.wait(copies)
            results = [_outcome(task) for task in copies]
            made = [copy.id for copy in results if isinstance(copy, Sandbox)]
            if not made:
                raise next(copy for copy in results if isinstance(copy, StrataboxError))
            hit("clone.copies-made")

            def write(tx: Transaction) -> None:
                operations.end(tx, operation.id)
                if key:
                    key.remember(tx, snapshot=snapshot.id, sandboxes=",".join(made))

            await self._world.write(write)
            return Cloned(snapshot=snapshot, copies=results)
        except BaseException:
            for task in copies:
                task.cancel()
            if copies:
                await settle(asyncio.wait(copies))
            what = f"the undoing of a clone of {reference}"
            await settle(self._world.surely(lambda: self.undo(operation), what))
            raise

    async def _best_level(self, reference: str, wanted: NewClone) -> Level | None:
        """Memory for a guest that runs and is copied as it is; else what its disks allow."""
        guest, record = await self._guests.find(reference)
        as_it_is = wanted.resources.cpus is None and wanted.resources.memory is None
        if as_it_is and record.ram_parked:
            return Level.MEMORY
        if as_it_is and record.has_process and record.answers and await is_readable(guest):
            return Level.MEMORY
        return None

    async def undo(self, operation: Operation) -> None:
        """Remove what a clone has made. Also for one that a killed daemon left."""
        assert operation.snapshot is not None
        snapshot = operation.snapshot
        made = await self._world.read(
            lambda tx: [
                record.id
                for record in sandboxes.everything(tx)
                if record.source_snapshot == snapshot and not record.state.is_over
            ]
        )
        for sandbox in made:
            await self._sandboxes.erase(sandbox)
        with contextlib.suppress(NotFoundError):
            # One that failed by itself stays, as any failed snapshot does, and tells why.
            record = await self._world.read(lambda tx: snapshots.get(tx, snapshot))
            if record.state is SnapshotState.READY:
                await self._snapshots.delete(snapshot)
        await self._world.write(lambda tx: operations.end(tx, operation.id))

    async def _copy(self, snapshot: Snapshot, wanted: NewClone, number: int) -> Sandbox:
        name = wanted.name
        if name and wanted.count > 1:
            name = f"{name}-{number}"
        new = NewSandbox(
            snapshot=snapshot.id,
            name=name,
            resources=wanted.resources,
            env=wanted.env,
            identity=wanted.identity,
            paused=wanted.paused,
            volumes=wanted.volumes,
            probe=wanted.probe,
            network=wanted.network,
            ready_timeout=wanted.ready_timeout,
        )
        async with self._world.rush.copies.turn(TURN_SECONDS):
            return await self._sandboxes.create(new)

    async def _again(self, before: Mapping[str, str]) -> Cloned:
        def look(tx: Transaction) -> Cloned:
            copies: list[Sandbox | StrataboxError] = []
            for sandbox in before["sandboxes"].split(","):
                try:
                    copies.append(sandboxes.get(tx, SandboxId(sandbox)))
                except NotFoundError as error:
                    copies.append(error)
            snapshot = snapshots.get(tx, SnapshotId(before["snapshot"]))
            return Cloned(snapshot=snapshot, copies=copies)

        return await self._world.read(look)


def _outcome(task: asyncio.Task[Sandbox]) -> Sandbox | StrataboxError:
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, StrataboxError):
        return error
    if isinstance(error, OSError):
        return host_error(error)
    raise error
