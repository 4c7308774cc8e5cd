"""The use cases of snapshots: take, change, delete."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from stratabox.daemon.lifecycle import budget, keeping, policy
from stratabox.daemon.lifecycle.capture import Plan, capture, plan_of
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.naming import make_up
from stratabox.daemon.lifecycle.common.once import Flights, Key
from stratabox.daemon.lifecycle.common.threads import settle
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.saving import require_readable
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import operations, sandboxes, snapshots, space
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.failpoints import hit
from stratabox.storage.files.store import Store
from stratabox.storage.model.errors import (
    ConflictError,
    DeniedError,
    FailedError,
    NotFoundError,
    StrataboxError,
)
from stratabox.storage.model.ids import SandboxId, SnapshotId, mint
from stratabox.storage.model.records import Sandbox, Snapshot
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
    scheduled: bool = False
    """Taken by the clock: then it must be due, and the next one's time is written with it."""


@dataclass(frozen=True, kw_only=True)
class Deleted:
    """What deleting a snapshot does to the disk."""

    id: SnapshotId
    freed_bytes: int
    kept_bytes: int
    kept_for: Sequence[str]
    """Who needs what stays, the nearest first; `KEPT_FOR` at most."""


KEPT_FOR = 100
"""As many as a caller is told of: on an old snapshot there can stand a hundred thousand."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A snapshot whose record, CREATING, and operation are written."""

    record: Snapshot
    operation: Operation
    plan: Plan | None
    """None: it is decided when its turn has come."""
    trims: bool
    """Its sandbox keeps only its last ones."""


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
        :raise DeniedError: INVALID_STATE, when the sandbox's state rules the level out;
            MEMORY_UNREADABLE, when the kernel rules out the level memory.
        :raise FailedError: SNAPSHOT_FAILED, with the record's `snapshot_id`.
        :raise NoSpaceError: BUDGET_EXCEEDED or STORE_NEARLY_FULL, before anything is done.
        """
        guest = await self._guests.named(reference)
        if wanted.name:
            policy.check_name(wanted.name)
        policy.check_metadata(wanted.metadata)
        if wanted.expires_at is not None:
            policy.check_expiry(wanted.expires_at, await self._world.read(lambda tx: tx.now))
        if wanted.level is Level.MEMORY and guest.domain is not None:
            await require_readable(guest)
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
        begun = await self._write_down(guest, wanted, None, its_turn=True, check=False)
        return await self._run(guest, begun)

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
        :raise DeniedError: INVALID_STATE, while it is being created, or reverted to.
        """
        return await settle(self._world.tasks.spawn(self._delete(reference), "delete snapshot"))

    async def foresee_delete(self, reference: str) -> Deleted:
        """What `delete` would do now. Changes nothing.

        :raise NotFoundError: SNAPSHOT_NOT_FOUND.
        :raise DeniedError: INVALID_STATE, as `delete` would.
        """

        def look(tx: Transaction) -> Deleted:
            record = snapshots.get(tx, snapshots.resolve(tx, reference))
            _require_deletable(tx, record)
            return _foresee(tx, record, self._world.store)

        return await self._world.read(look)

    async def delete_due(
        self, snapshot: SnapshotId, is_due: Callable[[Transaction, Snapshot], bool]
    ) -> Deleted | None:
        """Remove one without anybody asking, unless an operation that is under way needs it.

        :param is_due: asked again in the transaction that removes it: somebody may have wanted it
            kept meanwhile.
        :return: None when it stays, or is gone already.
        """

        def check(tx: Transaction, record: Snapshot) -> None:
            if snapshots.is_needed_now(tx, record.id) or not is_due(tx, record):
                raise DeniedError(f"snapshot {record.name!r} stays for now", snapshot=record.id)

        try:
            deleting = self._delete(snapshot, check)
            return await settle(self._world.tasks.spawn(deleting, "delete snapshot"))
        except (NotFoundError, DeniedError) as error:
            log.info("%s", error.message)
            return None

    async def keep_last(self, sandbox: SandboxId) -> None:
        """Delete the snapshots of a sandbox that are more than it keeps, the oldest first."""

        def beyond(tx: Transaction) -> list[SnapshotId]:
            try:
                record = sandboxes.get(tx, sandbox)
            except NotFoundError:
                return []
            if not record.keep_last or record.state.is_over:
                return []
            return snapshots.beyond(tx, sandbox, record.keep_last)

        for snapshot in await self._world.read(beyond):
            if await self.delete_due(snapshot, lambda tx, record: record.id in beyond(tx)):
                log.info("snapshot %s is deleted: newer ones are kept", snapshot)

    async def _create(
        self, guest: Guest, wanted: NewSnapshot, key: Key | None, *, wait: bool
    ) -> Snapshot:
        before = await self._world.read(key.recall) if key else None
        if before is not None:
            record = await self._world.read(
                lambda tx: snapshots.get(tx, SnapshotId(before["snapshot"]))
            )
            if record.state is SnapshotState.FAILED:
                raise failure(record)
            return record
        begun: asyncio.Future[Begun] = asyncio.get_running_loop().create_future()
        task = self._world.tasks.spawn(
            self._run_in_turn(guest, wanted, key, begun), f"snapshot {wanted.id}"
        )
        if wait:
            return await task
        await asyncio.wait((task, begun), return_when=asyncio.FIRST_COMPLETED)
        return begun.result().record if begun.done() else await task

    async def _run_in_turn(
        self, guest: Guest, wanted: NewSnapshot, key: Key | None, told: asyncio.Future[Begun]
    ) -> Snapshot:
        """:param told: gets what is written down, before its turn has come."""
        if not guest.lock.locked():
            async with guest.lock:
                begun = await self._write_down(guest, wanted, key, its_turn=True)
                told.set_result(begun)
                return await self._run(guest, begun)
        begun = await self._write_down(guest, wanted, key, its_turn=False)
        told.set_result(begun)
        async with guest.lock:
            return await self._run(guest, begun)

    async def _run(self, guest: Guest, begun: Begun) -> Snapshot:
        record = begun.record
        try:
            ready = await settle(capture(self._world, guest, record, begun.operation, begun.plan))
        except StrataboxError as error:
            raise failure(record, error) from error
        if begun.trims and ready.expires_at is None:
            self._world.tasks.spawn(self.keep_last(guest.id), f"keep last of {guest.id}")
        return ready

    async def _write_down(
        self,
        guest: Guest,
        wanted: NewSnapshot,
        key: Key | None,
        *,
        its_turn: bool,
        check: bool = True,
    ) -> Begun:
        """:param its_turn: the caller holds the guest's lock, and it can be planned at once.
        :param check: refuse what is impossible now, instead of beginning it.
        """
        snapshot_id = wanted.id
        plannable = its_turn and not guest.owes
        running = guest.domain is not None

        def write(tx: Transaction) -> Begun:
            sandbox = sandboxes.get(tx, guest.id)
            if check:  # told at once where it can be; asked again when its turn has come
                level = wanted.level or Level.CRASH
                policy.choose_level(level, Level.APPLICATION, sandbox, agent_answers=True)
            made = _plan(wanted.level, sandbox, running=running) if plannable else None
            operation = Operation(
                kind=Kind.SNAPSHOT,
                sandbox=guest.id,
                snapshot=snapshot_id,
                payload=made.payload() if made else {},
            )
            budget.check(tx, self._world.config, self._world.store.layout, "a snapshot")
            if wanted.scheduled:
                _follow_schedule(tx, sandbox)
            operations.begin(tx, operation)
            if key:
                key.remember(tx, snapshot=snapshot_id)
            record = snapshots.insert(
                tx,
                Snapshot(
                    id=snapshot_id,
                    workspace=sandbox.workspace,
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
                    probe=sandbox.probe,
                    network=sandbox.network,
                    metadata=dict(wanted.metadata),
                    created_at=tx.now,
                    expires_at=wanted.expires_at,
                ),
                reserve=self._world.store.bytes_of([disk.layer for disk in sandbox.disks]),
            )
            trims = bool(sandbox.keep_last)
            return Begun(record=record, operation=operation, plan=made, trims=trims)

        begun = await self._world.write(write)
        self._world.bus.publish(Happening.CREATED, begun.record)
        if wanted.scheduled:
            self._world.bus.publish(Happening.UPDATED, await guest.record())
        return begun

    async def _delete(
        self,
        reference: str,
        check: Callable[[Transaction, Snapshot], None] = lambda tx, record: None,
    ) -> Deleted:
        world = self._world

        def write(tx: Transaction) -> tuple[Snapshot, Deleted]:
            record = snapshots.get(tx, snapshots.resolve(tx, reference))
            _require_deletable(tx, record)
            check(tx, record)
            answer = _foresee(tx, record, world.store)
            snapshots.delete(tx, record.id)
            return record, answer

        record, answer = await world.write(write)
        hit("delete-snapshot.row-written")
        await world.spares.drop(record.id)
        world.memories.forget(record.id)
        freed = await world.sweep()
        await world.drop_seed(record.machine.seed)
        world.bus.publish(Happening.DELETED, record, freed_bytes=freed)
        return answer


def _plan(level: Level | None, sandbox: Sandbox, *, running: bool) -> Plan | None:
    """The plan of a level that depends on nothing but the record; None: of any other.

    None, too, for one that is impossible: that is told when it fails, with its record.
    """
    if level is None or level is Level.MEMORY:
        return None
    try:
        policy.choose_level(level, level, sandbox, agent_answers=True)
    except DeniedError:
        return None
    return plan_of(sandbox, level, running=running)


def _follow_schedule(tx: Transaction, sandbox: Sandbox) -> None:
    """Write when the next one is due, with the one that is begun.

    :raise ConflictError: NOT_DUE, when its schedule was changed meanwhile.
    """
    schedule = sandbox.schedule
    if schedule is None or schedule.next_at > tx.now:
        raise ConflictError(
            f"no snapshot of sandbox {sandbox.name!r} is due", reason="NOT_DUE", sandbox=sandbox.id
        )
    sandboxes.change(tx, sandbox.id, schedule=keeping.after(schedule, tx.now))


def _require_deletable(tx: Transaction, record: Snapshot) -> None:
    """:raise DeniedError: INVALID_STATE, while it is being created, or reverted to."""
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


def _foresee(tx: Transaction, record: Snapshot, store: Store) -> Deleted:
    """What comes free when it is deleted; looks at files' sizes."""
    tops = [disk.layer for disk in record.disks]
    goes = space.goes_with(tx, space.holding_of(record))
    # Only the layers that this snapshot itself sealed count as its own.
    kept = store.bytes_of(set(tops) - set(goes.layers))
    if record.ram and record.id not in goes.rams:
        kept += store.ram_bytes([record.id])
    kept_for = space.users_above(tx, tops, KEPT_FOR + 1, record.workspace)
    return Deleted(
        id=record.id,
        freed_bytes=store.bytes_of(goes.layers) + store.ram_bytes(goes.rams),
        kept_bytes=kept,
        kept_for=[user for user in kept_for if user != record.id][:KEPT_FOR],
    )


def failure(record: Snapshot, error: StrataboxError | None = None) -> FailedError:
    """The error that tells of a failed snapshot."""
    because = error.message if error else record.failure_reason
    return FailedError(
        f"snapshot {record.name!r} failed: {because}",
        reason="SNAPSHOT_FAILED",
        snapshot_id=record.id,
        cause=error.reason if error else None,
    )
