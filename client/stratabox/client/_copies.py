"""The plans of `client.sandboxes` that copy a sandbox, or put it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Generic

from stratabox.client import _convert, _probes, _requests
from stratabox.client._plans import Call, Plan
from stratabox.client._requests import Seconds
from stratabox.client._snapshots import create_snapshot
from stratabox.client.errors import InvalidArgumentError
from stratabox.client.network_records import Network
from stratabox.client.probe_records import ReadinessProbe
from stratabox.client.records import (
    CloneResult,
    Identity,
    RevertResult,
    S,
    Snapshot,
    SnapshotLevel,
    VolumeMount,
)
from stratabox.v1 import records_pb2
from stratabox.v1 import sandboxes_pb2 as pb

_SERVICE = "sandboxes"


class CopyPlans(Generic[S]):
    """Snapshot, clone and revert: the part of `SandboxPlans` that makes copies.

    :param make: Turns a message into the face's own class of sandbox.
    """

    def __init__(self, make: Callable[[records_pb2.Sandbox], S]) -> None:
        self._make = make

    def snapshot(
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
        """Capture the sandbox, which keeps running. The same as `client.snapshots.create`.

        :param level: "crash" or "application": that one or nothing. None: the strongest that the
            sandbox's state allows; the record tells which.
        :param quick: True is level "crash".
        :param expires_at: Aware; None: never.
        :param wait: Return when it is ready; otherwise at once, with a record that is `creating`.
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

    def clone(
        self,
        sandbox: str,
        *,
        name: str | None = None,
        count: int = 1,
        snapshot_name: str | None = None,
        cpus: int | None = None,
        memory: int | None = None,
        env: Mapping[str, str] | None = None,
        level: SnapshotLevel | str | None = None,
        quick: bool | None = None,
        volumes: Sequence[VolumeMount | str] = (),
        network: Network | str | Sequence[str] | None = None,
        identity: Identity | str | None = None,
        paused: bool = False,
        readiness_probe: ReadinessProbe | None = None,
        wait_for_ready: bool = True,
        ready_timeout: Seconds | None = None,
        idempotency_key: str | None = None,
    ) -> Plan[CloneResult[S]]:
        """Snapshot the sandbox now, and make `count` sandboxes of that snapshot.

        The result holds, for each copy, the sandbox or the error that it met; only when there is
        no copy at all does this raise, and leave nothing behind.

        :param name: With several copies, "-1", "-2" and so on are put behind it.
        :param count: 1-64.
        :param cpus: Instead of the source's, as memory (MiB). Storage is the source's.
        :param env: Over the source's env, key by key.
        :param volumes: What each copy gets, as at `client.sandboxes.create`; several can only read
            one. Those of the source they do not get.
        :param network: What they may reach, as at `client.sandboxes.create`; None: what the source
            may.
        :param identity: "keep" or "renew" (the default): whether the copies are the source.
        :param paused: Leave them at the instant of the snapshot; none is waited for.
        :param readiness_probe: As at `create`; None: the source's.
        :raise SnapshotFailedError: when the snapshot was not taken.
        :raise StrataboxError: what `client.snapshots.restore` raises, when no copy was made.
        """
        if count < 1:
            raise InvalidArgumentError(f"{count} copies cannot be made")
        with _requests.checked():
            request = pb.CloneSandboxRequest(
                sandbox=sandbox,
                count=count,
                name=name or "",
                snapshot_name=snapshot_name or "",
                resources=_requests.resources(cpus, memory),
                env=env or {},
                level=_requests.level(level, quick),
                volumes=_requests.mounts(volumes),
                network=_requests.network(network),
                identity=_requests.identity(identity),
                paused=paused,
                readiness_probe=_probes.message(readiness_probe),
                wait_for_ready=wait_for_ready,
                ready_timeout=_requests.duration(ready_timeout),
                idempotency_key=idempotency_key or "",
            )
        waits = _requests.seconds(ready_timeout)
        return Call(_SERVICE, "CloneSandbox", request, self._clone, waits)

    def _clone(self, message: pb.CloneSandboxResponse) -> CloneResult[S]:
        return CloneResult(
            snapshot=_convert.snapshot(message.snapshot),
            results=tuple(
                self._make(one.sandbox)
                if one.HasField("sandbox")
                else _convert.failure(one.failure)
                for one in message.results
            ),
        )

    def revert(
        self,
        sandbox: str,
        snapshot: str,
        *,
        identity: Identity | str | None = None,
        wait_for_ready: bool = True,
        ready_timeout: Seconds | None = None,
    ) -> Plan[RevertResult[S]]:
        """Put the sandbox back onto one of its own snapshots; it keeps its id.

        :param identity: "keep" (the default), or "renew".
        :raise SnapshotFailedError: when the safety snapshot failed; nothing was changed.
        :raise InvalidStateError: when the sandbox or the snapshot does not allow it.
        """
        with _requests.checked():
            request = pb.RevertSandboxRequest(
                sandbox=sandbox,
                snapshot=snapshot,
                identity=_requests.identity(identity),
                wait_for_ready=wait_for_ready,
                ready_timeout=_requests.duration(ready_timeout),
            )
        waits = _requests.seconds(ready_timeout)
        return Call(_SERVICE, "RevertSandbox", request, self._revert, waits)

    def _revert(self, message: pb.RevertSandboxResponse) -> RevertResult[S]:
        return RevertResult(
            sandbox=self._make(message.sandbox),
            safety_snapshot=_convert.snapshot(message.safety_snapshot),
        )
