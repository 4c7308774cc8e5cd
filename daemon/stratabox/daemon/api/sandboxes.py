"""SandboxesService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from google.protobuf import duration_pb2
from grpc.aio import ServicerContext

from stratabox.daemon.api import convert, messages, networks, probes
from stratabox.daemon.api.errors import streaming, unary
from stratabox.daemon.api.watching import one_by_one, watch
from stratabox.daemon.lifecycle import changing
from stratabox.daemon.lifecycle.clones import Clones, NewClone
from stratabox.daemon.lifecycle.creation import NewSandbox
from stratabox.daemon.lifecycle.reverts import Reverts
from stratabox.daemon.lifecycle.running import power
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.sandboxes import Sandboxes
from stratabox.daemon.lifecycle.snapshots import NEVER
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import images, lookup, sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import InvalidArgumentError, StrataboxError
from stratabox.storage.model.probes import Probe
from stratabox.storage.model.records import Sandbox, Snapshot
from stratabox.v1 import records_pb2, sandboxes_pb2, sandboxes_pb2_grpc

Context = ServicerContext[Any, Any]

_MUTABLE = {
    "name",
    "env",
    "metadata",
    "tags",
    "expires_at",
    "on_timeout",
    "keep_last",
    "snapshot_schedule",
    "readiness_probe",
    "network",
}


@dataclass(frozen=True, kw_only=True)
class SandboxesServicer(sandboxes_pb2_grpc.SandboxesServiceServicer):
    """Message in, one call, message out."""

    world: World
    guests: Guests
    sandboxes: Sandboxes
    clones: Clones
    reverts: Reverts

    @unary
    async def CreateSandbox(
        self, request: sandboxes_pb2.CreateSandboxRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Create a sandbox from an image or a snapshot."""
        if request.WhichOneof("source") == "snapshot" and not request.snapshot:
            raise InvalidArgumentError("snapshot is empty", field="snapshot")
        wanted = NewSandbox(
            image=request.image,
            snapshot=request.snapshot,
            name=request.name,
            resources=convert.resources_from(request.resources),
            env=dict(request.env),
            metadata=dict(request.metadata),
            tags=tuple(request.tags),
            data_disks=tuple(request.data_disks),
            volumes=convert.wishes_from(request.volumes),
            cold=request.cold,
            expires_at=expiry(request),
            on_timeout=convert.on_timeout_from(request.on_timeout),
            keep_last=request.keep_last,
            rhythm=convert.rhythm_from(request),
            identity=convert.identity_from(request.identity),
            paused=request.paused,
            verify=request.verify,
            user_data=request.user_data,
            ssh_keys=tuple(request.ssh_keys),
            probe=probes.probe_from(request),
            network=networks.wanted(request),
            ready_timeout=ready_timeout(self.world, request),
        )
        key = convert.key_from("CreateSandbox", request)
        return await self._message(await self.sandboxes.create(wanted, key))

    @unary
    async def GetSandbox(
        self, request: sandboxes_pb2.GetSandboxRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Return one sandbox."""
        _, record = await self.guests.find(request.sandbox)
        return await self._message(record)

    @unary
    async def ListSandboxes(
        self, request: sandboxes_pb2.ListSandboxesRequest, context: Context
    ) -> sandboxes_pb2.ListSandboxesResponse:
        """List sandboxes, newest first."""
        states = convert.sandbox_states(request.states)
        page = lookup.Page(size=request.page_size, token=request.page_token)

        def look(tx: Transaction) -> tuple[list[records_pb2.Sandbox], str]:
            wanted = sandboxes.Filter(
                states=states,
                name=request.name,
                tags=tuple(request.tags),
                metadata=dict(request.metadata),
                image=images.resolve(tx, request.image) if request.image else None,
                include_terminated=request.include_terminated,
            )
            records, token = sandboxes.list_page(tx, wanted, page)
            return messages.of_sandboxes(tx, self.world, records), token

        found, token = await self.world.read(look)
        return sandboxes_pb2.ListSandboxesResponse(sandboxes=found, next_page_token=token)

    @unary
    async def UpdateSandbox(
        self, request: sandboxes_pb2.UpdateSandboxRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Change what may be changed of a sandbox."""
        paths = mask_paths(request.update_mask.paths, _MUTABLE)
        new = request.sandbox
        changed = changing.update(
            self.world,
            self.guests,
            new.id,
            name=new.name if "name" in paths else None,
            env=dict(new.env) if "env" in paths else None,
            metadata=dict(new.metadata) if "metadata" in paths else None,
            tags=tuple(new.tags) if "tags" in paths else None,
            expires_at=(expiry(new) or NEVER) if "expires_at" in paths else None,
            on_timeout=(convert.on_timeout_from(new.on_timeout) if "on_timeout" in paths else None),
            keep_last=new.keep_last if "keep_last" in paths else None,
            rhythm=(convert.rhythm_from(new) or NEVER) if "snapshot_schedule" in paths else None,
            probe=(probes.probe_from(new) or Probe()) if "readiness_probe" in paths else None,
            network=networks.required(new) if "network" in paths else None,
        )
        record = await self.world.tasks.see_through(changed)
        return await self._message(record)

    @unary
    async def PauseSandbox(
        self, request: sandboxes_pb2.PauseSandboxRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Stop the vCPUs, or save the memory and end the process."""
        guest, _ = await self.guests.find(request.sandbox)
        pause = power.pause_to_disk if request.to_disk else power.pause
        return await self._message(await self.world.tasks.see_through(pause(self.world, guest)))

    @unary
    async def ResumeSandbox(
        self, request: sandboxes_pb2.ResumeSandboxRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Let a paused guest go on."""
        guest, _ = await self.guests.find(request.sandbox)
        seconds = ready_timeout(self.world, request)
        identity = convert.identity_from(request.identity)
        record = await self.world.tasks.see_through(power.resume(self.world, guest, identity))
        if seconds is not None and record.identity_due is not None and not record.ready:
            record = await guest.wait_ready(seconds)
        return await self._message(record)

    @unary
    async def StopSandbox(
        self, request: sandboxes_pb2.StopSandboxRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Shut the guest down."""
        guest, _ = await self.guests.find(request.sandbox)
        timeout = self.world.config.stop_timeout
        if request.HasField("timeout"):
            timeout = convert.seconds_from(request.timeout, "timeout")
        stopping = power.stop(self.world, guest, force=request.force, timeout=timeout)
        return await self._message(await self.world.tasks.see_through(stopping))

    @unary
    async def StartSandbox(
        self, request: sandboxes_pb2.StartSandboxRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Boot a stopped or failed sandbox."""
        guest, _ = await self.guests.find(request.sandbox)
        seconds = ready_timeout(self.world, request)
        starting = power.start(self.world, guest, probes.probe_from(request))
        record = await self.world.tasks.see_through(starting)
        if seconds is not None:
            record = await guest.wait_ready(seconds)
        return await self._message(record)

    @unary
    async def TerminateSandbox(
        self, request: sandboxes_pb2.TerminateSandboxRequest, context: Context
    ) -> records_pb2.Sandbox:
        """End the guest; the record stays."""
        return await self._message(await self.sandboxes.terminate(request.sandbox))

    @unary
    async def DeleteSandbox(
        self, request: sandboxes_pb2.DeleteSandboxRequest, context: Context
    ) -> sandboxes_pb2.DeleteSandboxResponse:
        """Terminate where needed, then remove the record."""
        return sandboxes_pb2.DeleteSandboxResponse(id=await self.sandboxes.delete(request.sandbox))

    @unary
    async def ExecuteCommand(
        self, request: sandboxes_pb2.ExecuteCommandRequest, context: Context
    ) -> sandboxes_pb2.ExecuteCommandResponse:
        """Run one command in the guest."""
        guest, _ = await self.guests.find(request.sandbox)
        if bool(request.argv) == bool(request.shell):
            raise InvalidArgumentError("name the command once: as argv or as shell", field="argv")
        argv = list(request.argv) or ["/bin/sh", "-c", request.shell]
        timeout = convert.seconds_from(request.timeout, "timeout")
        result = await power.execute(
            guest, argv, env=dict(request.env), cwd=request.cwd, timeout=timeout or None
        )
        return sandboxes_pb2.ExecuteCommandResponse(
            exit_code=result.exit_code,
            signal=result.signal,
            stdout=result.stdout,
            stderr=result.stderr,
            stdout_truncated=result.stdout_truncated,
            stderr_truncated=result.stderr_truncated,
            timed_out=result.timed_out,
            duration=convert.duration(timedelta(seconds=result.duration)),
            out_of_memory=result.out_of_memory,
            disk_full=result.disk_full,
        )

    @unary
    async def CloneSandbox(
        self, request: sandboxes_pb2.CloneSandboxRequest, context: Context
    ) -> sandboxes_pb2.CloneSandboxResponse:
        """Snapshot and restore in one, several times."""
        wanted = NewClone(
            count=request.count or 1,
            name=request.name,
            snapshot_name=request.snapshot_name,
            resources=convert.resources_from(request.resources),
            env=dict(request.env),
            level=convert.level_from(request.level),
            identity=convert.identity_from(request.identity),
            paused=request.paused,
            volumes=convert.wishes_from(request.volumes),
            probe=probes.probe_from(request),
            network=networks.wanted(request),
            ready_timeout=ready_timeout(self.world, request),
        )
        key = convert.key_from("CloneSandbox", request)
        done = await self.clones.clone(request.sandbox, wanted, key)
        results = []
        for copy in done.copies:
            if isinstance(copy, StrataboxError):
                results.append(sandboxes_pb2.CloneResult(failure=convert.failure(copy)))
            else:
                results.append(sandboxes_pb2.CloneResult(sandbox=await self._message(copy)))
        return sandboxes_pb2.CloneSandboxResponse(
            snapshot=await self._snapshot(done.snapshot), results=results
        )

    @unary
    async def RevertSandbox(
        self, request: sandboxes_pb2.RevertSandboxRequest, context: Context
    ) -> sandboxes_pb2.RevertSandboxResponse:
        """Put a sandbox back onto one of its snapshots."""
        seconds = ready_timeout(self.world, request)
        identity = convert.identity_from(request.identity)
        done = await self.reverts.revert(request.sandbox, request.snapshot, seconds, identity)
        return sandboxes_pb2.RevertSandboxResponse(
            sandbox=await self._message(done.sandbox),
            safety_snapshot=await self._snapshot(done.safety_snapshot),
        )

    @streaming
    async def WatchSandboxes(
        self, request: sandboxes_pb2.WatchSandboxesRequest, context: Context
    ) -> AsyncIterator[sandboxes_pb2.SandboxEvent]:
        """Stream every change."""

        def look(tx: Transaction) -> tuple[AsyncIterator[Sandbox], Callable[[Sandbox], bool]]:
            wanted = {sandboxes.resolve(tx, reference) for reference in request.sandboxes}
            present = one_by_one(sandboxes.everything(tx, own=True))
            return present, lambda record: not wanted or record.id in wanted

        async for event, record in watch(
            self.world.bus,
            Sandbox,
            lambda: self.world.read(look),
            changes_only=request.changes_only,
        ):
            yield sandboxes_pb2.SandboxEvent(
                type=convert.happening(event),
                sandbox=await self._message(record),
                time=convert.timestamp(event.time),
            )

    async def _message(self, record: Sandbox) -> records_pb2.Sandbox:
        return (await self.world.read(lambda tx: messages.of_sandboxes(tx, self.world, [record])))[
            0
        ]

    async def _snapshot(self, record: Snapshot) -> records_pb2.Snapshot:
        return (await self.world.read(lambda tx: messages.of_snapshots(tx, self.world, [record])))[
            0
        ]


def mask_paths(paths: Any, allowed: set[str]) -> set[str]:
    """The fields that an update names.

    :raise InvalidArgumentError: for none, or one that cannot be changed.
    """
    wrong = sorted(set(paths) - allowed)
    if wrong or not paths:
        raise InvalidArgumentError(
            f"update_mask {','.join(wrong) or 'is empty'}:"
            f" it may name {', '.join(sorted(allowed))}",
            field="update_mask",
        )
    return set(paths)


def expiry(message: Any) -> datetime | None:
    """`expires_at` of a request or record; None where it is not set.

    :raise InvalidArgumentError: when it is outside the calendar.
    """
    if not message.HasField("expires_at"):
        return None
    return convert.time_from(message.expires_at, "expires_at")


def ready_timeout(world: World, request: Any) -> float | None:
    """Seconds to wait for readiness; None: do not wait. :raise InvalidArgumentError: if absurd."""
    if request.HasField("wait_for_ready") and not request.wait_for_ready:
        return None
    if not request.HasField("ready_timeout"):
        return world.config.ready_timeout
    limit: duration_pb2.Duration = request.ready_timeout
    return convert.seconds_from(limit, "ready_timeout")
