"""SandboxesService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from google.protobuf import duration_pb2
from grpc.aio import ServicerContext

from stratabox.daemon.api import convert
from stratabox.daemon.api.errors import streaming, unary
from stratabox.daemon.api.watching import watch
from stratabox.daemon.lifecycle import power
from stratabox.daemon.lifecycle.clones import Clones, NewClone
from stratabox.daemon.lifecycle.guests import Guests
from stratabox.daemon.lifecycle.reverts import Reverts
from stratabox.daemon.lifecycle.sandboxes import NewSandbox, Sandboxes
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import images, layers, lookup, sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import InvalidArgumentError, StrataboxError
from stratabox.storage.model.records import Sandbox
from stratabox.v1 import records_pb2, sandboxes_pb2, sandboxes_pb2_grpc

Context = ServicerContext[Any, Any]

_MUTABLE = {"name", "env", "metadata", "tags"}


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
            cold=request.cold,
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
            return [_message(tx, record) for record in records], token

        messages, token = await self.world.read(look)
        return sandboxes_pb2.ListSandboxesResponse(sandboxes=messages, next_page_token=token)

    @unary
    async def UpdateSandbox(
        self, request: sandboxes_pb2.UpdateSandboxRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Change name, env, metadata or tags."""
        paths = mask_paths(request.update_mask.paths, _MUTABLE)
        new = request.sandbox
        record = await self.sandboxes.update(
            new.id,
            name=new.name if "name" in paths else None,
            env=dict(new.env) if "env" in paths else None,
            metadata=dict(new.metadata) if "metadata" in paths else None,
            tags=tuple(new.tags) if "tags" in paths else None,
        )
        return await self._message(record)

    @unary
    async def PauseSandbox(
        self, request: sandboxes_pb2.PauseSandboxRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Stop the vCPUs."""
        guest, _ = await self.guests.find(request.sandbox)
        return await self._message(
            await self.world.tasks.see_through(power.pause(self.world, guest))
        )

    @unary
    async def ResumeSandbox(
        self, request: sandboxes_pb2.ResumeSandboxRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Let the vCPUs run again."""
        guest, _ = await self.guests.find(request.sandbox)
        return await self._message(
            await self.world.tasks.see_through(power.resume(self.world, guest))
        )

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
        record = await self.world.tasks.see_through(power.start(self.world, guest))
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
            snapshot=convert.snapshot(done.snapshot), results=results
        )

    @unary
    async def RevertSandbox(
        self, request: sandboxes_pb2.RevertSandboxRequest, context: Context
    ) -> sandboxes_pb2.RevertSandboxResponse:
        """Put a sandbox back onto one of its snapshots."""
        seconds = ready_timeout(self.world, request)
        done = await self.reverts.revert(request.sandbox, request.snapshot, seconds)
        return sandboxes_pb2.RevertSandboxResponse(
            sandbox=await self._message(done.sandbox),
            safety_snapshot=convert.snapshot(done.safety_snapshot),
        )

    @streaming
    async def WatchSandboxes(
        self, request: sandboxes_pb2.WatchSandboxesRequest, context: Context
    ) -> AsyncIterator[sandboxes_pb2.SandboxEvent]:
        """Stream every change."""

        def look(tx: Transaction) -> tuple[list[Sandbox], Callable[[Sandbox], bool]]:
            wanted = {sandboxes.resolve(tx, reference) for reference in request.sandboxes}
            return sandboxes.everything(tx), lambda record: not wanted or record.id in wanted

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
        return await self.world.read(lambda tx: _message(tx, record))


def _message(tx: Transaction, record: Sandbox) -> records_pb2.Sandbox:
    depths = {disk.index: layers.depth(tx, disk.layer) for disk in record.disks}
    return convert.sandbox(record, depths)


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


def ready_timeout(world: World, request: Any) -> float | None:
    """Seconds to wait for readiness; None: do not wait. :raise InvalidArgumentError: if absurd."""
    if request.HasField("wait_for_ready") and not request.wait_for_ready:
        return None
    if not request.HasField("ready_timeout"):
        return world.config.ready_timeout
    limit: duration_pb2.Duration = request.ready_timeout
    return convert.seconds_from(limit, "ready_timeout")
