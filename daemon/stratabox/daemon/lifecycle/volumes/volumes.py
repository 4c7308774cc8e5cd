"""The use cases of volumes: make, change, grow, delete; and their snapshots.

A new volume is a row first, then a file, then a row that names the file; of a daemon that dies in
between nothing stays (`discard_unfinished`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from stratabox.daemon.lifecycle import budget, policy
from stratabox.daemon.lifecycle.common.naming import make_up
from stratabox.daemon.lifecycle.common.once import Flights, Key
from stratabox.daemon.lifecycle.common.threads import in_thread, settle, undone_by
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.volumes import claims, growing, sealing
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import idempotency, layers, volume_snapshots, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.files.store import NewOverlay
from stratabox.storage.files.volumes import make_disk
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.ids import LayerId, VolumeId, VolumeSnapshotId, mint
from stratabox.storage.model.records import MIB, Layer, Volume, VolumeSnapshot
from stratabox.storage.model.states import LayerState, Level, VolumeState

log = logging.getLogger(__name__)

SIZE = range(MIB, (16 << 40) + 1)
"""Bytes; whole MiB."""


@dataclass(frozen=True, kw_only=True)
class NewVolume:
    """What to make. At most one of `volume` and `snapshot`: what it is a copy of."""

    name: str = ""
    size: int = 0
    """Bytes; 0: as large as its source."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    volume: str = ""
    snapshot: str = ""


class Volumes:
    """Makes, changes and deletes volumes and their snapshots."""

    def __init__(self, world: World, guests: Guests, flights: Flights) -> None:
        self._world = world
        self._guests = guests
        self._flights = flights

    async def create(self, wanted: NewVolume, key: Key | None = None) -> Volume:
        """Make a volume. Nobody's leaving ends it.

        :raise AlreadyExistsError: VOLUME_ALREADY_EXISTS.
        :raise NotFoundError: VOLUME_NOT_FOUND, VOLUME_SNAPSHOT_NOT_FOUND.
        :raise InvalidArgumentError: INVALID_RESOURCES, INVALID_ARGUMENT, IDEMPOTENCY_MISMATCH.
        :raise DeniedError: VOLUME_NOT_READY, TOOL_MISSING.
        :raise NoSpaceError: NO_SPACE, BUDGET_EXCEEDED, STORE_NEARLY_FULL.
        """
        if wanted.name:
            policy.check_name(wanted.name)
        policy.check_metadata(wanted.metadata)
        if wanted.volume and wanted.snapshot:
            raise InvalidArgumentError(
                "a volume is a copy of a volume or of a snapshot of one, not of both",
                field="source",
            )
        if wanted.size or not (wanted.volume or wanted.snapshot):
            check_size(wanted.size)
        return await self._flights.join(
            key, lambda: self._create(wanted, key), name="create volume", outlives_callers=True
        )

    async def update(
        self, reference: str, *, name: str | None, metadata: Mapping[str, str] | None
    ) -> Volume:
        """Change what the caller may change; None leaves a field alone.

        :raise NotFoundError: VOLUME_NOT_FOUND.
        :raise AlreadyExistsError: VOLUME_ALREADY_EXISTS.
        :raise InvalidArgumentError: INVALID_ARGUMENT.
        """
        changes: dict[str, object] = {}
        if name is not None:
            changes["name"] = policy.check_name(name)
        if metadata is not None:
            policy.check_metadata(metadata)
            changes["metadata"] = dict(metadata)
        return await self._world.write(
            lambda tx: volumes.change(tx, volumes.resolve(tx, reference), **changes)
        )

    async def resize(self, reference: str, size: int) -> Volume:
        """Grow a volume, and its file system where a guest that runs writes it.

        :raise StrataboxError: as ``growing.grow``.
        """
        check_size(size)
        growing_it = growing.grow(self._world, self._guests, reference, size)
        return await settle(self._world.tasks.spawn(growing_it, "resize volume"))

    async def delete(self, reference: str) -> tuple[VolumeId, int]:
        """Remove a volume that nobody has; its id, and the bytes that came free.

        :raise NotFoundError: VOLUME_NOT_FOUND.
        :raise DeniedError: VOLUME_IN_USE, VOLUME_NOT_READY.
        """
        return await settle(self._world.tasks.spawn(self._delete(reference), "delete volume"))

    async def snapshot(
        self, reference: str, name: str, level: Level | None, key: Key | None = None
    ) -> VolumeSnapshot:
        """Capture a volume. Nobody's leaving ends it.

        :raise NotFoundError: VOLUME_NOT_FOUND.
        :raise StrataboxError: as ``sealing.seal``.
        """
        if name:
            policy.check_name(name)
        return await self._flights.join(
            key,
            lambda: self._snapshot(reference, name, level, key),
            name="snapshot volume",
            outlives_callers=True,
        )

    async def delete_snapshot(self, reference: str) -> tuple[VolumeSnapshotId, int]:
        """Remove a snapshot; its id, and the bytes that came free.

        :raise NotFoundError: VOLUME_SNAPSHOT_NOT_FOUND.
        """
        return await settle(
            self._world.tasks.spawn(self._delete_snapshot(reference), "delete volume snapshot")
        )

    async def _create(self, wanted: NewVolume, key: Key | None) -> Volume:
        world = self._world

        def begin(tx: Transaction) -> tuple[Volume, VolumeSnapshot | None]:
            before = key.recall(tx) if key else None
            if before is not None:
                return volumes.get(tx, VolumeId(before["volume"])), None
            budget.check(tx, world.config, world.store.layout, "a volume")
            size, source, snapshot = _source(tx, wanted)
            record = Volume(
                id=VolumeId(mint()),
                workspace=tx.home,
                name=wanted.name or make_up(),
                state=VolumeState.CREATING,
                size=size,
                source=source,
                metadata=dict(wanted.metadata),
                created_at=tx.now,
                updated_at=tx.now,
            )
            if key:
                key.remember(tx, volume=record.id)
            return volumes.insert(tx, record), snapshot

        record, snapshot = await world.write(begin)
        if record.state is VolumeState.READY:
            return record
        hit("volume.row-written")
        try:
            if wanted.volume:
                return await self._copy_volume(record)
            if snapshot is not None:
                return await self._copy_snapshot(record, snapshot.id)
            return await self._make(record)
        except BaseException:
            await settle(world.write(lambda tx: _discard(tx, record.id)))
            raise

    async def _make(self, record: Volume) -> Volume:
        # The record's own id: so a file that a killed daemon left is known to be that record's.
        world, layer = self._world, LayerId(record.id)
        formatted = await in_thread(make_disk, world.store.layout, layer, record.size)
        async with undone_by(lambda: in_thread(world.store.remove_overlays, [layer])):
            hit("volume.stored")
            done = await world.write(
                lambda tx: _ready(tx, record, layer, None, formatted, clean=True)
            )
        hit("volume.ready-written")
        return done

    async def _copy_snapshot(self, record: Volume, source: VolumeSnapshotId) -> Volume:
        world, layer = self._world, LayerId(record.id)
        # It must not be deleted meanwhile.
        async with world.volume_locks.hold(source):
            snapshot = await world.read(lambda tx: volume_snapshots.get(tx, source))
            overlay = NewOverlay(layer, snapshot.layer, record.size)
            await in_thread(world.store.make_overlays, [overlay])

            def write(tx: Transaction) -> Volume:
                # Its layer may have been merged into another one, which reads the same.
                now = volume_snapshots.get(tx, source)
                return _ready(
                    tx, record, layer, now.layer, now.filesystem,
                    clean=now.consistency is not Level.CRASH, backing=snapshot.layer,
                )  # fmt: skip

            async with undone_by(lambda: in_thread(world.store.remove_overlays, [layer])):
                hit("volume.stored")
                done = await world.write(write)
        world.chains_changed.set()
        hit("volume.ready-written")
        return done

    async def _copy_volume(self, record: Volume) -> Volume:
        source = VolumeId(record.source or "")
        copy = sealing.Copy(volume=record.id, layer=LayerId(record.id), size=record.size)
        return await sealing.seal(
            self._world,
            self._guests,
            source,
            None,
            lambda tx, sealed: _ready(
                tx, record, copy.layer, sealed.layer, sealed.filesystem,
                clean=sealed.level is not Level.CRASH,
            ),
            copy=copy,
        )  # fmt: skip

    async def _delete(self, reference: str) -> tuple[VolumeId, int]:
        world = self._world
        volume = await world.read(lambda tx: volumes.resolve(tx, reference))

        def write(tx: Transaction) -> None:
            record = volumes.get(tx, volume)
            claims.require_ready(record)
            if record.attachments:
                raise claims.in_use(tx, record)
            volumes.delete(tx, volume)

        async with world.volume_locks.hold(volume):
            await world.write(write)
        hit("delete-volume.row-removed")
        return volume, await world.sweep()

    async def _snapshot(
        self, reference: str, name: str, level: Level | None, key: Key | None
    ) -> VolumeSnapshot:
        world = self._world

        def look(tx: Transaction) -> VolumeSnapshot | VolumeId:
            before = key.recall(tx) if key else None
            if before is not None:
                return volume_snapshots.get(tx, VolumeSnapshotId(before["volume_snapshot"]))
            budget.check(tx, world.config, world.store.layout, "a snapshot of a volume")
            return volumes.resolve(tx, reference)

        found = await world.read(look)
        if isinstance(found, VolumeSnapshot):
            return found

        def write(tx: Transaction, sealed: sealing.Sealed) -> VolumeSnapshot:
            snapshot = VolumeSnapshot(
                id=VolumeSnapshotId(mint()),
                workspace=sealed.volume.workspace,
                name=name or make_up(),
                volume=sealed.volume.id,
                volume_name=sealed.volume.name,
                layer=sealed.layer,
                size=sealed.size,
                filesystem=sealed.filesystem,
                consistency=sealed.level,
                created_at=tx.now,
            )
            if key:
                key.remember(tx, volume_snapshot=snapshot.id)
            return volume_snapshots.insert(tx, snapshot)

        return await sealing.seal(world, self._guests, found, level, write)

    async def _delete_snapshot(self, reference: str) -> tuple[VolumeSnapshotId, int]:
        def write(tx: Transaction) -> None:
            volume_snapshots.get(tx, snapshot)  # of two deletes at once one is told that it is gone
            volume_snapshots.delete(tx, snapshot)

        world = self._world
        snapshot = await world.read(lambda tx: volume_snapshots.resolve(tx, reference))
        async with world.volume_locks.hold(snapshot):
            await world.write(write)
        hit("delete-volume-snapshot.row-removed")
        return snapshot, await world.sweep()


async def discard_unfinished(world: World) -> None:
    """At start: volumes that a killed daemon was making are gone; their files are strays."""

    def write(tx: Transaction) -> None:
        for record in volumes.everything(tx):
            if record.state is not VolumeState.READY:
                log.info("discarding volume %s, which was %s", record.id, record.state)
                _discard(tx, record.id)

    await world.write(write)


def check_size(size: int) -> None:
    """:raise InvalidArgumentError: INVALID_RESOURCES."""
    if size not in SIZE or size % MIB:
        raise InvalidArgumentError(
            f"a volume of {size} bytes cannot be: 1 MiB to 16 TiB in whole MiB",
            reason="INVALID_RESOURCES",
            field="size_bytes",
            minimum=SIZE[0],
            maximum=SIZE[-1],
        )


def _source(tx: Transaction, wanted: NewVolume) -> tuple[int, str | None, VolumeSnapshot | None]:
    """Size and source of a new volume, and the snapshot where it is one."""
    if wanted.snapshot:
        snapshot = volume_snapshots.get(tx, volume_snapshots.resolve(tx, wanted.snapshot))
        least, source, what = snapshot.size, str(snapshot.id), f"its source {snapshot.name!r}"
    elif wanted.volume:
        volume = volumes.get(tx, volumes.resolve(tx, wanted.volume))
        claims.require_ready(volume)
        least, source, what = volume.size, str(volume.id), f"its source {volume.name!r}"
        snapshot = None
    else:
        return wanted.size, None, None
    size = wanted.size or least
    if size < least:
        raise InvalidArgumentError(
            f"a volume of {size} bytes is smaller than {what} ({least} bytes)",
            reason="INVALID_RESOURCES",
            field="size_bytes",
            minimum=least,
        )
    return size, source, snapshot


def _ready(
    tx: Transaction,
    record: Volume,
    layer: LayerId,
    parent: LayerId | None,
    filesystem: int,
    *,
    clean: bool,
    backing: LayerId | None = None,
) -> Volume:
    layers.insert(
        tx,
        Layer(
            id=layer,
            parent=parent,
            backing=backing,
            state=LayerState.ACTIVE,
            size=record.size,
            created_at=tx.now,
        ),
    )
    return volumes.change(
        tx,
        record.id,
        state=VolumeState.READY,
        layer=layer,
        filesystem=filesystem,
        clean=clean,
    )


def _discard(tx: Transaction, volume: VolumeId) -> None:
    idempotency.forget_outcome(tx, "volume", volume)
    volumes.delete(tx, volume)
