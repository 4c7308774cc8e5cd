"""The use cases of snapshots: take, change, delete."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.capture import capture
from stratabox.daemon.lifecycle.events import Happening
from stratabox.daemon.lifecycle.guest import Guest
from stratabox.daemon.lifecycle.guests import Guests
from stratabox.daemon.lifecycle.naming import make_up
from stratabox.daemon.lifecycle.once import Flights, Key
from stratabox.daemon.lifecycle.threads import settle
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import gc, layers, operations, rams, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import DeniedError, FailedError, StrataboxError
from stratabox.storage.model.ids import SnapshotId, mint
from stratabox.storage.model.records import Snapshot
from stratabox.storage.model.states import Level, SnapshotState

log = logging.getLogger(__name__)


class Never:
    """The type of :data:`NEVER`."""


NEVER = Never()
"""For :meth:`Snapshots.update`: no expiry."""


@dataclass(frozen=True, kw_only=True)
class NewSnapshot:
    """What to take."""

    id: SnapshotId = field(default_factory=lambda: SnapshotId(mint()))
    name: str = ""
    level: Level | None = None
    """None: the strongest that the sandbox's state allows, up to the configured default."""
    expires_at: datetime | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Deleted:
    """What deleting a snapshot does to the disk, as far as can be told at once."""

    id: SnapshotId
    freed_bytes: int
    kept_bytes: int
    kept_for: Sequence[str]


class Snapshots:
    """Takes, changes and deletes snapshots."""

    def __init__(self, world: World, guests: Guests, flights: Flights) -> None:
        self._world = world
        self._guests = guests
        self._flights = flights

    async def create(
        self, reference: str, wanted: NewSnapshot, *, wait: bool = True, key: Key | None = None
    ) -> Snapshot:
        """Take a snapshot. Several at once on one sandbox queue. Nobody's leaving ends it.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise DeniedError: INVALID_STATE, when the sandbox's state rules the level out.
        :raise FailedError: SNAPSHOT_FAILED, with the record's `snapshot_id`.
        """
        guest, sandbox = await self._guests.find(reference)
        if wanted.name:
            policy.check_name(wanted.name)
        policy.check_metadata(wanted.metadata)
        policy.check_expiry(wanted.expires_at, await self._world.read(lambda tx: tx.now))
        # Told at once where it can be; asked again when its turn has come.
        policy.choose_level(
            wanted.level or Level.CRASH, Level.APPLICATION, sandbox, agent_answers=True
        )
        return await self._flights.join(
            key,
            lambda: self._create(guest, wanted, key, wait=wait),
            name="snapshot",
            outlives_callers=True,
        )

    async def take_locked(self, guest: Guest, wanted: NewSnapshot) -> Snapshot:
        """Take one while the caller holds the guest's lock. For clone and revert.

        :raise FailedError: SNAPSHOT_FAILED.
        """
        record, operation = await self._write_down(guest, wanted, None)
        return await self._run(guest, record, operation)

    async def update(
        self,
        reference: str,
        *,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
        expires_at: datetime | Never | None = None,
    ) -> Snapshot:
        """Change what the caller may change; None leaves a field alone.

        :raise NotFoundError: SNAPSHOT_NOT_FOUND.
        :raise InvalidArgumentError: INVALID_ARGUMENT.
        """
        changes: dict[str, object] = {}
        if name is not None:
            changes["name"] = policy.check_name(name)
        if metadata is not None:
            policy.check_metadata(metadata)
            changes["metadata"] = dict(metadata)

        def write(tx: Transaction) -> Snapshot:
            snapshot = snapshots.resolve(tx, reference)
            if isinstance(expires_at, Never):
                changes["expires_at"] = None
            elif expires_at is not None:
                policy.check_expiry(expires_at, tx.now)
                changes["expires_at"] = expires_at
            if not changes:
                return snapshots.get(tx, snapshot)
            return snapshots.change(tx, snapshot, **changes)

        record = await self._world.write(write)
        if changes:
            self._world.bus.publish(Happening.UPDATED, record)
        return record

    async def delete(self, reference: str) -> Deleted:
        """Remove the record at once, and its layers when nothing needs them any more.

        :raise NotFoundError: SNAPSHOT_NOT_FOUND; of two deletes at once one gets it.
        :raise DeniedError: INVALID_STATE, while it is being created.
        """
        return await settle(self._world.tasks.spawn(self._delete(reference), "delete snapshot"))

    async def _create(
        self, guest: Guest, wanted: NewSnapshot, key: Key | None, *, wait: bool
    ) -> Snapshot:
        before = await self._world.read(lambda tx: key.recall(tx) if key else None)
        if before is not None:
            record = await self._world.read(
                lambda tx: snapshots.get(tx, SnapshotId(before["snapshot"]))
            )
            if record.state is SnapshotState.FAILED:
                raise failure(record)
            return record
        record, operation = await self._write_down(guest, wanted, key)
        task = self._world.tasks.spawn(
            self._run_in_turn(guest, record, operation), f"snapshot {record.id}"
        )
        if wait:
            return await task
        return record

    async def _run_in_turn(self, guest: Guest, record: Snapshot, operation: Operation) -> Snapshot:
        async with guest.lock:
            return await self._run(guest, record, operation)

    async def _run(self, guest: Guest, record: Snapshot, operation: Operation) -> Snapshot:
        try:
            return await settle(capture(self._world, guest, record, operation))
        except StrataboxError as error:
            raise failure(record, error) from error

    async def _write_down(
        self, guest: Guest, wanted: NewSnapshot, key: Key | None
    ) -> tuple[Snapshot, Operation]:
        operation = Operation(kind=Kind.SNAPSHOT, sandbox=guest.id, snapshot=wanted.id)
        snapshot_id = wanted.id

        def write(tx: Transaction) -> Snapshot:
            sandbox = sandboxes.get(tx, guest.id)
            operations.begin(tx, operation)
            if key:
                key.remember(tx, snapshot=snapshot_id)
            return snapshots.insert(
                tx,
                Snapshot(
                    id=snapshot_id,
                    name=wanted.name or make_up(),
                    state=SnapshotState.CREATING,
                    requested_level=wanted.level,
                    source_sandbox=sandbox.id,
                    source_sandbox_name=sandbox.name,
                    image=sandbox.image,
                    image_name=sandbox.image_name,
                    cpus=sandbox.cpus,
                    memory=sandbox.memory,
                    storage=sandbox.storage,
                    machine=sandbox.machine,
                    env=sandbox.env,
                    metadata=dict(wanted.metadata),
                    created_at=tx.now,
                    expires_at=wanted.expires_at,
                ),
            )

        record = await self._world.write(write)
        self._world.bus.publish(Happening.CREATED, record)
        return record, operation

    async def _delete(self, reference: str) -> Deleted:
        world = self._world

        def write(tx: Transaction) -> tuple[Snapshot, Deleted]:
            record = snapshots.get(tx, snapshots.resolve(tx, reference))
            if record.state is SnapshotState.CREATING:
                raise DeniedError(
                    f"snapshot {record.name!r} is being created: delete it when that has ended",
                    snapshot=record.id,
                    state=record.state,
                )
            for operation in operations.unfinished(tx):
                if operation.kind is Kind.REVERT and operation.snapshot == record.id:
                    raise DeniedError(
                        f"sandbox {operation.sandbox} is being reverted to snapshot"
                        f" {record.name!r}: delete it when that has ended",
                        snapshot=record.id,
                        sandbox=operation.sandbox,
                    )
            tops = [disk.layer for disk in record.disks]
            kept_for = sorted({user for top in tops for user in layers.users(tx, top)})
            kept_for = [user for user in kept_for if user != record.id]
            snapshots.delete(tx, record.id)
            parents = {layer.id: layer.parent for layer in layers.everything(tx)}
            goes, stays = gc.freed_by_removing(tops, layers.referenced(tx), parents)
            memory_goes = rams.garbage(tx)
            memory_stays = [record.id] if record.ram and record.id not in memory_goes else []
            # Only the layers that this snapshot itself sealed count as its own.
            freed = world.store.bytes_of(goes) + world.store.ram_bytes(memory_goes)
            kept = world.store.bytes_of(stays & set(tops)) + world.store.ram_bytes(memory_stays)
            answer = Deleted(id=record.id, freed_bytes=freed, kept_bytes=kept, kept_for=kept_for)
            return record, answer

        record, answer = await world.write(write)
        hit("delete-snapshot.row-written")
        world.memories.forget(record.id)
        freed = await world.sweep()
        world.bus.publish(Happening.DELETED, record, freed_bytes=freed)
        return answer


def failure(record: Snapshot, error: StrataboxError | None = None) -> FailedError:
    """The error that tells of a failed snapshot."""
    because = error.message if error else record.failure_reason
    return FailedError(
        f"snapshot {record.name!r} failed: {because}",
        reason="SNAPSHOT_FAILED",
        snapshot_id=record.id,
        cause=error.reason if error else None,
    )
