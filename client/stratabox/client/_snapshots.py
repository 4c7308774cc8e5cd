"""The plans of `client.snapshots`."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Generic

from google.protobuf.field_mask_pb2 import FieldMask

from stratabox.client import _convert, _probes, _requests
from stratabox.client._jobs import job_of
from stratabox.client._plans import Call, Fold, Plan, Script, Steps, Stream
from stratabox.client._requests import UNSET, Seconds, Unset
from stratabox.client._transfers import SnapshotTransfers
from stratabox.client.background import Compaction
from stratabox.client.errors import SnapshotFailedError, SnapshotNotFoundError
from stratabox.client.network_records import Network
from stratabox.client.probe_records import ReadinessProbe
from stratabox.client.records import (
    EventType,
    Identity,
    Page,
    S,
    Snapshot,
    SnapshotDeletion,
    SnapshotEvent,
    SnapshotLevel,
    SnapshotState,
    TimeoutAction,
    VolumeMount,
)
from stratabox.v1 import records_pb2
from stratabox.v1 import snapshots_pb2 as pb

_SERVICE = "snapshots"
_COMPACT_SECONDS = 24 * 3600.0
"""For what the daemon does when it has time for it: a call's own limit is no measure of that."""


def create_snapshot(
    sandbox: str,
    *,
    name: str | None,
    level: SnapshotLevel | str | None,
    quick: bool | None,
    expires_at: datetime | None,
    metadata: Mapping[str, str] | None,
    wait: bool,
    idempotency_key: str | None,
) -> Plan[Snapshot]:
    """Plan what `snapshots.create` and `sandboxes.snapshot` both do."""
    with _requests.checked():
        request = pb.CreateSnapshotRequest(
            sandbox=sandbox,
            name=name or "",
            level=_requests.level(level, quick),
            expires_at=_requests.timestamp(expires_at),
            metadata=metadata or {},
            wait=wait,
            idempotency_key=idempotency_key or "",
        )
    return Call(_SERVICE, "CreateSnapshot", request, _convert.snapshot)


class SnapshotPlans(SnapshotTransfers, Generic[S]):
    """Taking, keeping and restoring snapshots.

    What is said of names, units and errors at `client.sandboxes` holds here too.
    """

    def __init__(self, make: Callable[[records_pb2.Sandbox], S]) -> None:
        self._make = make

    def create(
        self,
        sandbox: str,
        *,
        name: str | None = None,
        level: SnapshotLevel | str | None = None,
        quick: bool | None = None,
        expires_at: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
        wait: bool = True,
        idempotency_key: str | None = None,
    ) -> Plan[Snapshot]:
        """Capture a sandbox, which keeps running. The same as `client.sandboxes.snapshot`.

        A caller who goes away ends the waiting, not the snapshot.

        :param level: "crash" or "application": that one or nothing. None: the strongest that the
            sandbox's state allows; the record tells which.
        :param quick: True is level "crash".
        :param expires_at: Aware; None: never.
        :param wait: Return when it is ready; otherwise at once, with a record that is `creating`.
        :param idempotency_key: The same key within 24 hours returns the same snapshot.
        :raise SnapshotFailedError: when it was not taken; `snapshot_id` names the failed record.
        :raise InvalidStateError: when the sandbox's state does not allow that level.
        :raise NoSpaceError: when the host has no room.
        """
        return create_snapshot(
            sandbox,
            name=name,
            level=level,
            quick=quick,
            expires_at=expires_at,
            metadata=metadata,
            wait=wait,
            idempotency_key=idempotency_key,
        )

    def get(self, snapshot: str) -> Plan[Snapshot]:
        """Return one snapshot as it is now."""
        with _requests.checked():
            request = pb.GetSnapshotRequest(snapshot=snapshot)
        return Call(_SERVICE, "GetSnapshot", request, _convert.snapshot)

    def list_page(
        self,
        *,
        page_size: int | None = None,
        page_token: str | None = None,
        sandbox: str | None = None,
        states: Sequence[SnapshotState | str] = (),
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Plan[Page[Snapshot]]:
        """Return one page of the list, newest first.

        :param page_size: At most so many, 1-1000; None: 100.
        :param page_token: `next_page_token` of the page before, with the same filters.
        :raise InvalidArgumentError: when the token or a filter cannot be right.
        """
        with _requests.checked():
            request = pb.ListSnapshotsRequest(
                page_size=page_size or 0,
                page_token=page_token or "",
                sandbox=sandbox or "",
                states=[_convert.number(SnapshotState, state) for state in states],
                name=name or "",
                metadata=metadata or {},
            )
        return Call(_SERVICE, "ListSnapshots", request, self._page)

    def _page(self, message: pb.ListSnapshotsResponse) -> Page[Snapshot]:
        items = tuple(_convert.snapshot(one) for one in message.snapshots)
        return Page(items=items, next_page_token=message.next_page_token or None)

    def list(
        self,
        *,
        sandbox: str | None = None,
        states: Sequence[SnapshotState | str] = (),
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Plan[builtins.list[Snapshot]]:
        """Return all snapshots that fit every filter, newest first.

        :param sandbox: Of this sandbox; also of one that is gone, by its whole id.
        :param states: In one of these; none given: all.
        :param name: With exactly this name.
        :param metadata: With all of these entries.
        """

        def steps() -> Steps[builtins.list[Snapshot]]:
            found: builtins.list[Snapshot] = []
            token: str | None = None
            while True:
                page: Page[Snapshot] = yield self.list_page(
                    page_size=1000,
                    page_token=token,
                    sandbox=sandbox,
                    states=states,
                    name=name,
                    metadata=metadata,
                )
                found += page.items
                token = page.next_page_token
                if token is None:
                    return found

        return Script(steps())

    def update(
        self,
        snapshot: str,
        *,
        name: str | None = None,
        expires_at: datetime | Unset | None = UNSET,
        metadata: Mapping[str, str] | None = None,
    ) -> Plan[Snapshot]:
        """Replace what is given, whole.

        :param expires_at: Aware; None: it never expires. Not given: as it is.
        :raise InvalidArgumentError: when a value breaks a limit, or the expiry is past.
        """
        paths = [
            path
            for path, given in (
                ("name", name is not None),
                ("expires_at", expires_at is not UNSET),
                ("metadata", metadata is not None),
            )
            if given
        ]
        with _requests.checked():
            request = pb.UpdateSnapshotRequest(
                snapshot=records_pb2.Snapshot(
                    id=snapshot,
                    name=name or "",
                    expires_at=_requests.timestamp(
                        None if isinstance(expires_at, Unset) else expires_at
                    ),
                    metadata=metadata or {},
                ),
                update_mask=FieldMask(paths=paths),
            )
        return Call(_SERVICE, "UpdateSnapshot", request, _convert.snapshot)

    def delete(self, snapshot: str, *, dry_run: bool = False) -> Plan[SnapshotDeletion]:
        """Remove the record at once, and its layers when nothing needs them any more.

        Sandboxes and snapshots made from it go on working; the result tells what stays because of
        them.

        :param dry_run: Change nothing, and tell what would come free.
        :raise InvalidStateError: when it is being created, or reverted to.
        """
        with _requests.checked():
            request = pb.DeleteSnapshotRequest(snapshot=snapshot, dry_run=dry_run)
        return Call(_SERVICE, "DeleteSnapshot", request, _convert.snapshot_deletion)

    def compact(self, snapshot: str, *, wait: bool = True) -> Plan[Compaction]:
        """Have a snapshot's own layers compressed, by jobs in the background.

        What it takes gets less, and reading it a little slower. What is compressed already is left
        alone.

        :param wait: Return only when it is done.
        :raise SnapshotNotReadyError: when it is not ready.
        :raise CompactFailedError: when a job failed; the snapshot is as it was.
        :raise InterruptedOperationError: when a job was cancelled.
        """
        with _requests.checked():
            request = pb.CompactSnapshotRequest(snapshot=snapshot, wait=wait)
        return Call(_SERVICE, "CompactSnapshot", request, _compaction, waits=_COMPACT_SECONDS)

    def restore(
        self,
        snapshot: str,
        *,
        name: str | None = None,
        cpus: int | None = None,
        memory: int | None = None,
        storage: int | None = None,
        env: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        tags: Sequence[str] = (),
        volumes: Sequence[VolumeMount | str] = (),
        cold: bool = False,
        expires_at: datetime | None = None,
        on_timeout: TimeoutAction | str | None = None,
        verify: bool = False,
        network: Network | str | Sequence[str] | None = None,
        identity: Identity | str | None = None,
        paused: bool = False,
        readiness_probe: ReadinessProbe | None = None,
        wait_for_ready: bool = True,
        ready_timeout: Seconds | None = None,
        idempotency_key: str | None = None,
    ) -> Plan[S]:
        """Make a new sandbox of a snapshot; any number of times, also at once.

        From a memory snapshot it goes on at that very instant.

        :param cpus: Instead of the snapshot's, as memory (MiB); storage (GiB) may only grow. Not
            when it goes on from memory.
        :param cold: Boot from a memory snapshot's disks instead of going on from its memory.
        :param verify: Compare all of a memory snapshot's saved memory with its checksums first, and
            refuse it (CorruptError) where they differ.
        :param network: What it may reach, as at `client.sandboxes.create`; None: what its source
            might.
        :param identity: "keep" or "renew" (the default): whether it is who its source was.
        :param paused: Leave it at the snapshot's instant; `resume` lets it go on. It is not waited
            for.
        :param expires_at: Aware: when `on_timeout` ("terminate", "pause" or "snapshot") is done to
            it.
        :param env: Over the snapshot's env, key by key.
        :param metadata: Of the new sandbox, as tags.
        :param readiness_probe: As at `client.sandboxes.create`; None: the snapshot's.
        :param volumes: As at `client.sandboxes.create`. Those of its source it does not get:
            `left_behind` tells which.
        :raise SnapshotNotReadyError: when it is not ready.
        :raise InvalidResourcesError: when a size is out of its limits.
        :raise ResourcesFixedError: when the saved memory rules that size out.
        :raise MachineMismatchError: when the saved memory cannot go on on the daemon's host.
        :raise AgentUnavailableError: when the guest was not ready in time; nothing is left of it.
        :raise ProbeFailedError: when its probe did not pass in time; nothing is left of it.
        :raise QemuFailedError: when QEMU did not start; nothing is left of it.
        :raise NoSpaceError: when the host has no room.
        """
        with _requests.checked():
            request = pb.RestoreSnapshotRequest(
                snapshot=snapshot,
                name=name or "",
                resources=_requests.resources(cpus, memory, storage),
                env=env or {},
                metadata=metadata or {},
                tags=tags,
                volumes=_requests.mounts(volumes),
                cold=cold,
                expires_at=_requests.timestamp(expires_at),
                on_timeout=_requests.on_timeout(on_timeout),
                verify=verify,
                network=_requests.network(network),
                identity=_requests.identity(identity),
                paused=paused,
                readiness_probe=_probes.message(readiness_probe),
                wait_for_ready=wait_for_ready,
                ready_timeout=_requests.duration(ready_timeout),
                idempotency_key=idempotency_key or "",
            )
        waits = _requests.seconds(ready_timeout)
        return Call(_SERVICE, "RestoreSnapshot", request, self._make, waits)

    def wait_ready(self, snapshot: str, *, timeout: Seconds | None = None) -> Plan[Snapshot]:
        """Wait until the snapshot is ready; the daemon tells, nothing is polled.

        :param timeout: None: no limit.
        :raise SnapshotFailedError: when it was not taken.
        :raise SnapshotNotFoundError: when it is deleted before that.
        :raise DeadlineExceededError: when the time was up; the snapshot goes on.
        """
        limit = None if timeout is None else _requests.seconds(timeout)

        def steps() -> Steps[Snapshot]:
            record: Snapshot = yield self.get(snapshot)
            if (ready := _ready(record)) is not None:
                return ready

            def step(message: pb.SnapshotEvent) -> Snapshot | None:
                event = _convert.snapshot_event(message)
                if event.snapshot.id != record.id:
                    return None
                return _ready(event.snapshot, gone=event.type == EventType.DELETED)

            request = pb.WatchSnapshotsRequest(snapshots=[record.id])
            result: Snapshot = yield Fold(_SERVICE, "WatchSnapshots", request, step, limit)
            return result

        return Script(steps())

    def watch(
        self,
        *,
        sandbox: str | None = None,
        snapshots: Sequence[str] = (),
        changes_only: bool = False,
    ) -> Stream[SnapshotEvent]:
        """Follow every change, for as long as the caller reads.

        :param sandbox: Only of this one.
        :param snapshots: Only these; none: all, also those to come.
        :param changes_only: Leave out the present ones that come first.
        """
        with _requests.checked():
            request = pb.WatchSnapshotsRequest(
                sandbox=sandbox or "", snapshots=snapshots, changes_only=changes_only
            )
        return Stream(_SERVICE, "WatchSnapshots", request, _convert.snapshot_event)


def _ready(record: Snapshot, *, gone: bool = False) -> Snapshot | None:
    """Return the record when it is ready, None while it is being taken, or raise."""
    metadata = {"snapshot_id": record.id}
    if record.state is SnapshotState.FAILED and not gone:
        why = record.failure_reason or "no reason was given"
        raise SnapshotFailedError(f"the snapshot {record.id} failed: {why}", metadata=metadata)
    if gone or record.state in (SnapshotState.DELETING, SnapshotState.DELETED):
        raise SnapshotNotFoundError(f"the snapshot {record.id} was deleted", metadata=metadata)
    return record if record.state is SnapshotState.READY else None


def _compaction(message: pb.CompactSnapshotResponse) -> Compaction:
    return Compaction(
        snapshot=_convert.snapshot(message.snapshot),
        jobs=tuple(job_of(one) for one in message.jobs),
    )
