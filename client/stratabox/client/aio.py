"""The SDK for asyncio: `AsyncClient`, its resources, and `AsyncSandbox`.

Line for line the sibling of `sync`; what can be said once is said in the plans.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Concatenate, Self

import grpc
import grpc.aio

from stratabox.client import _convert, _dial, _wire
from stratabox.client._access import Access, Pair, access
from stratabox.client._dial import AsyncConnection
from stratabox.client._events_faces import AsyncEvents
from stratabox.client._files_aio import AsyncFiles, AsyncSandboxFiles
from stratabox.client._host import check_plan, disk_usage_plan, host_plan
from stratabox.client._images import ImagePlans
from stratabox.client._jobs import JobPlans
from stratabox.client._observing import ObservingPlans
from stratabox.client._plans import (
    Call,
    Download,
    Face,
    Fold,
    Method,
    P,
    Plan,
    R,
    Script,
    Stream,
    Upload,
)
from stratabox.client._ports import Target
from stratabox.client._ports_aio import (
    AsyncSandboxPorts,
    AsyncSandboxSsh,
    dial,
    ports_of,
    ports_of_sandbox,
    ssh_of,
    ssh_of_sandbox,
)
from stratabox.client._process_faces import AsyncProcess
from stratabox.client._process_resources import AsyncProcesses, AsyncSandboxProcesses
from stratabox.client._processes import Words
from stratabox.client._requests import Seconds
from stratabox.client._sandboxes import SandboxPlans
from stratabox.client._snapshots import SnapshotPlans
from stratabox.client._volumes import VolumePlans
from stratabox.client._workspace_faces import AsyncWorkspaces
from stratabox.client.addresses import default_address
from stratabox.client.errors import InternalError, SandboxNotFoundError, StrataboxError
from stratabox.client.host_records import DiskUsage, Host
from stratabox.client.process_records import Terminal
from stratabox.client.records import Checked, SandboxRecord
from stratabox.v1 import records_pb2


class Transport:
    """Carries plans out over one channel, and awaits them.

    The channel is opened at the first call, because it belongs to the loop that runs then.
    """

    def __init__(self, access: Access, timeout: float | None) -> None:
        self._access = access
        self._address = access.address
        self._timeout = timeout
        self._channel: grpc.aio.Channel | None = None
        self._stubs: dict[str, Any] = {}
        self._carriers: dict[type, Callable[[Any], Awaitable[Any]]] = {
            Call: self._call,
            Fold: self._fold,
            Upload: self._upload,
            Download: self._download,
            Script: self._script,
        }

    async def close(self) -> None:
        """Close the channel, where there is one."""
        if self._channel is not None:
            await self._channel.close()

    @property
    def address(self) -> str:
        """Of the daemon."""
        return self._address

    def stub(self, service: str, rpc: str) -> Any:
        """Return a method of gRPC's own, for what no plan can say."""
        if self._channel is None:
            self._channel = self._access.channel(grpc.aio, _wire.CHANNEL_OPTIONS)
            self._stubs = _wire.stubs(self._channel, self._access)
        return getattr(self._stubs[service], rpc)

    async def run(self, build: Callable[[], Plan[R]]) -> R:
        """Make a plan, carry it out, and return its result.

        :raise StrataboxError: what the plan documents.
        """
        return await self._run(build())

    async def _run(self, plan: Plan[R]) -> R:
        result: R = await self._carriers[type(plan)](plan)
        return result

    def stream(self, build: Callable[[], Stream[R]]) -> AsyncIterator[R]:
        """Begin to follow a stream now; end it when the iterator is closed."""
        plan = build()
        rpc = self._rpc(plan)(plan.request)
        return self._results(rpc, plan.convert)

    async def _results(self, rpc: Any, convert: Callable[[Any], R]) -> AsyncIterator[R]:
        try:
            async for message in rpc:
                yield convert(message)
        except grpc.RpcError as error:
            raise _wire.unpack(error, self._address) from error
        finally:
            rpc.cancel()

    def _rpc(self, plan: Call[R] | Fold[R] | Upload[R] | Download[R] | Stream[R]) -> Any:
        return self.stub(plan.service, plan.rpc)

    async def _call(self, plan: Call[R]) -> R:
        limit = _wire.deadline(self._timeout, plan.waits)
        try:
            return plan.convert(await self._rpc(plan)(plan.request, timeout=limit))
        except grpc.RpcError as error:
            raise _wire.unpack(error, self._address) from error

    async def _fold(self, plan: Fold[R]) -> R:
        rpc = self._rpc(plan)(plan.request, timeout=plan.timeout)
        try:
            async for message in rpc:
                if (result := plan.step(message)) is not None:
                    return result
        except grpc.RpcError as error:
            raise _wire.unpack(error, self._address) from error
        finally:
            rpc.cancel()
        raise InternalError(f"the daemon ended {plan.rpc} without a result")

    async def _upload(self, plan: Upload[R]) -> R:
        failed: list[Exception] = []

        async def requests() -> AsyncIterator[Any]:
            # The file is read in a thread, so that a slow disk does not hold up the loop.
            pieces = iter(plan.requests)
            try:
                while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                    yield piece
            except Exception as error:
                failed.append(error)
                raise

        try:
            return plan.convert(await self._rpc(plan)(requests()))
        except grpc.RpcError as error:
            if failed:
                raise failed[0] from None
            raise _wire.unpack(error, self._address) from error

    async def _download(self, plan: Download[R]) -> R:
        # The file is written in a thread, so that a slow disk does not hold up the loop.
        try:
            rpc = self._rpc(plan)(plan.request)
            try:
                async for message in rpc:
                    await asyncio.to_thread(plan.step, message)
            finally:
                rpc.cancel()
            return await asyncio.to_thread(plan.finish)
        except grpc.RpcError as error:
            raise _wire.unpack(error, self._address) from error
        finally:
            plan.close()

    async def _script(self, plan: Script[R]) -> R:
        answer: Any = None
        failure: StrataboxError | None = None
        try:
            while True:
                send, throw = plan.steps.send, plan.steps.throw
                wanted = send(answer) if failure is None else throw(failure)
                try:
                    answer, failure = await self._run(wanted), None
                except StrataboxError as error:
                    failure = error
        except StopIteration as end:
            result: R = end.value
            return result
        finally:
            plan.steps.close()


def _method(build: Callable[Concatenate[Any, P], Plan[R]]) -> Method[P, Coroutine[Any, Any, R]]:
    return Method(build)


def _watch(build: Callable[Concatenate[Any, P], Stream[R]]) -> Method[P, AsyncIterator[R]]:
    return Method(build, "stream")


def _own(build: Callable[Concatenate[Any, str, P], Plan[R]]) -> Method[P, Coroutine[Any, Any, R]]:
    return Method(build)


def _own_watch(
    build: Callable[Concatenate[Any, str, P], Stream[R]],
) -> Method[P, AsyncIterator[R]]:
    return Method(build, "stream")


@dataclass(frozen=True, kw_only=True)
class AsyncSandbox(SandboxRecord, Face):
    """One guest, as it was when the daemon answered, and what can be done with it.

    A frozen record: every method returns what is new. As a context manager it deletes the sandbox
    at the end of the block.
    """

    _client: AsyncClient = field(repr=False, compare=False)

    refresh = _own(SandboxPlans["AsyncSandbox"].get)
    update = _own(SandboxPlans["AsyncSandbox"].update)
    execute = _own(SandboxPlans["AsyncSandbox"].execute)
    pause = _own(SandboxPlans["AsyncSandbox"].pause)
    resume = _own(SandboxPlans["AsyncSandbox"].resume)
    stop = _own(SandboxPlans["AsyncSandbox"].stop)
    start = _own(SandboxPlans["AsyncSandbox"].start)
    terminate = _own(SandboxPlans["AsyncSandbox"].terminate)
    delete = _own(SandboxPlans["AsyncSandbox"].delete)
    snapshot = _own(SandboxPlans["AsyncSandbox"].snapshot)
    clone = _own(SandboxPlans["AsyncSandbox"].clone)
    revert = _own(SandboxPlans["AsyncSandbox"].revert)
    wait_ready = _own(SandboxPlans["AsyncSandbox"].wait_ready)
    attach_volume = _own(SandboxPlans["AsyncSandbox"].attach_volume)
    detach_volume = _own(SandboxPlans["AsyncSandbox"].detach_volume)
    console_log = _own(ObservingPlans.console_log)
    watch_console = _own_watch(ObservingPlans.watch_console)
    write_console = _own(ObservingPlans.write_console)
    metrics = _own(ObservingPlans.metrics)

    @property
    def processes(self) -> AsyncSandboxProcesses:
        """Commands that go on in this guest by themselves."""
        return AsyncSandboxProcesses(self._carrier()[1], self.id)

    async def spawn(
        self,
        command: Words,
        *,
        cwd: str | None = None,
        env: Mapping[str, str | bytes] | None = None,
        user: str | None = None,
        timeout: Seconds | None = None,
        stdin: bool = False,
        terminal: Terminal | bool = False,
    ) -> AsyncProcess:
        """Run a command in the guest, as a stream: input, output, signals, a terminal.

        One that does not exist ends with exit code 127, one that cannot be run or whose `cwd` is
        not there with 126; what it has printed says why.

        :param command: A line for the guest's shell, or a program and its arguments as they are.
        :param cwd: Working directory in the guest; None: the user's home.
        :param env: Over the sandbox's env, key by key.
        :param user: Name or number of the user that it runs as; None: root.
        :param timeout: After so much of the guest's own time it is killed with all that it started,
            and its end says `timed_out`; None or 0: no limit.
        :param stdin: It has a standard input, which you write; else that is empty.
        :param terminal: It has a terminal, and so a standard input; what it prints is all stdout.
        :raise InvalidStateError: when the sandbox does not run.
        :raise NotFoundError: USER_NOT_FOUND.
        :raise NoSshdError: when the guest has no sshd; `execute` needs none.
        :raise UnavailableError: when the guest does not answer.
        """
        return await self._client.processes.spawn(
            self.id,
            command,
            cwd=cwd,
            env=env,
            user=user,
            timeout=timeout,
            stdin=stdin,
            terminal=terminal,
        )

    @property
    def ports(self) -> AsyncSandboxPorts:
        """Connections into this guest, and out of it, that need no network."""
        return ports_of_sandbox(self._carrier()[1], self.id)

    @property
    def ssh(self) -> AsyncSandboxSsh:
        """Who may log in to this guest."""
        return ssh_of_sandbox(self._carrier()[1], self.id)

    async def dial(self, target: Target) -> AsyncConnection:
        """Connect to something that listens in the guest; see `client.ports.dial`."""
        return await dial(self._carrier()[1], _dial.to_target(self.id, target))

    @property
    def files(self) -> AsyncSandboxFiles:
        """Files in this guest."""
        return AsyncSandboxFiles(self._carrier()[1], self.id)

    def _carrier(self) -> tuple[Any, Any, tuple[Any, ...]]:
        plans, transport, _ = self._client.sandboxes._carrier()
        return plans, transport, (self.id,)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.delete()
        except SandboxNotFoundError:
            pass
        except StrataboxError as failure:
            if error is None:
                raise
            error.add_note(f"and the sandbox {self.id} was not deleted: {failure}")


class _Resource(Face):
    def __init__(self, plans: Any, transport: Transport) -> None:
        self._carries = plans, transport, ()

    def _carrier(self) -> tuple[Any, Any, tuple[Any, ...]]:
        return self._carries


class AsyncSandboxes(_Resource):
    """Creating, using, copying and ending sandboxes; see `SandboxPlans`."""

    create = _method(SandboxPlans[AsyncSandbox].create)
    get = _method(SandboxPlans[AsyncSandbox].get)
    list_page = _method(SandboxPlans[AsyncSandbox].list_page)
    list = _method(SandboxPlans[AsyncSandbox].list)
    update = _method(SandboxPlans[AsyncSandbox].update)
    execute = _method(SandboxPlans[AsyncSandbox].execute)
    pause = _method(SandboxPlans[AsyncSandbox].pause)
    resume = _method(SandboxPlans[AsyncSandbox].resume)
    stop = _method(SandboxPlans[AsyncSandbox].stop)
    start = _method(SandboxPlans[AsyncSandbox].start)
    terminate = _method(SandboxPlans[AsyncSandbox].terminate)
    delete = _method(SandboxPlans[AsyncSandbox].delete)
    snapshot = _method(SandboxPlans[AsyncSandbox].snapshot)
    clone = _method(SandboxPlans[AsyncSandbox].clone)
    revert = _method(SandboxPlans[AsyncSandbox].revert)
    wait_ready = _method(SandboxPlans[AsyncSandbox].wait_ready)
    attach_volume = _method(SandboxPlans[AsyncSandbox].attach_volume)
    detach_volume = _method(SandboxPlans[AsyncSandbox].detach_volume)
    watch = _watch(SandboxPlans[AsyncSandbox].watch)
    console_log = _method(ObservingPlans.console_log)
    watch_console = _watch(ObservingPlans.watch_console)
    write_console = _method(ObservingPlans.write_console)
    metrics = _method(ObservingPlans.metrics)
    list_metrics = _method(ObservingPlans.list_metrics)
    watch_metrics = _watch(ObservingPlans.watch_metrics)


class AsyncSnapshots(_Resource):
    """Taking, keeping and restoring snapshots; see `SnapshotPlans`."""

    create = _method(SnapshotPlans[AsyncSandbox].create)
    get = _method(SnapshotPlans[AsyncSandbox].get)
    list_page = _method(SnapshotPlans[AsyncSandbox].list_page)
    list = _method(SnapshotPlans[AsyncSandbox].list)
    update = _method(SnapshotPlans[AsyncSandbox].update)
    delete = _method(SnapshotPlans[AsyncSandbox].delete)
    restore = _method(SnapshotPlans[AsyncSandbox].restore)
    compact = _method(SnapshotPlans[AsyncSandbox].compact)
    export = _method(SnapshotPlans[AsyncSandbox].export)
    import_file = _method(SnapshotPlans[AsyncSandbox].import_file)
    wait_ready = _method(SnapshotPlans[AsyncSandbox].wait_ready)
    watch = _watch(SnapshotPlans[AsyncSandbox].watch)


class AsyncImages(_Resource):
    """Building, importing and removing images; see `ImagePlans`."""

    build_debian = _method(ImagePlans.build_debian)
    build_tiny = _method(ImagePlans.build_tiny)
    import_file = _method(ImagePlans.import_file)
    export = _method(ImagePlans.export)
    import_archive = _method(ImagePlans.import_archive)
    get = _method(ImagePlans.get)
    list_page = _method(ImagePlans.list_page)
    list = _method(ImagePlans.list)
    delete = _method(ImagePlans.delete)


class AsyncJobs(_Resource):
    """Looking at jobs in the background, holding them and giving them up; see `JobPlans`."""

    list = _method(JobPlans.list)
    get = _method(JobPlans.get)
    pause = _method(JobPlans.pause)
    resume = _method(JobPlans.resume)
    cancel = _method(JobPlans.cancel)


class AsyncVolumes(_Resource):
    """Making, keeping, growing and capturing volumes; see `VolumePlans`."""

    create = _method(VolumePlans.create)
    get = _method(VolumePlans.get)
    list_page = _method(VolumePlans.list_page)
    list = _method(VolumePlans.list)
    update = _method(VolumePlans.update)
    resize = _method(VolumePlans.resize)
    delete = _method(VolumePlans.delete)
    snapshot = _method(VolumePlans.snapshot)
    get_snapshot = _method(VolumePlans.get_snapshot)
    list_snapshots_page = _method(VolumePlans.list_snapshots_page)
    list_snapshots = _method(VolumePlans.list_snapshots)
    delete_snapshot = _method(VolumePlans.delete_snapshot)


class AsyncClient:
    """A connection to the daemon, for one event loop. Close it, or use it with `async with`.

    Takes, and raises, what `sync.Client` does.
    """

    def __init__(
        self,
        address: str | None = None,
        timeout: float | None = None,
        *,
        api_key: str | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        client_certificate: Pair | None = None,
        workspace: str | None = None,
    ) -> None:
        self.address = address or default_address()
        shown = access(self.address, api_key, ca_file, client_certificate, workspace)
        self._transport = Transport(shown, timeout)
        self.sandboxes = AsyncSandboxes(SandboxPlans(self._sandbox), self._transport)
        self.snapshots = AsyncSnapshots(SnapshotPlans(self._sandbox), self._transport)
        self.images = AsyncImages(ImagePlans(), self._transport)
        self.volumes = AsyncVolumes(VolumePlans(), self._transport)
        self.jobs = AsyncJobs(JobPlans(), self._transport)
        self.events = AsyncEvents(self._transport)
        self.files = AsyncFiles(self._transport)
        self.ports = ports_of(self._transport)
        self.processes = AsyncProcesses(self._transport)
        self.ssh = ssh_of(self._transport)
        self.workspaces = AsyncWorkspaces(self._transport)

    def _sandbox(self, message: records_pb2.Sandbox) -> AsyncSandbox:
        return AsyncSandbox(_client=self, **_convert.sandbox_fields(message))

    async def host(self) -> Host:
        """Return what the daemon is and uses."""
        return await self._transport.run(host_plan)

    async def disk_usage(self) -> DiskUsage:
        """Look at all files of the daemon's state folder: what takes how much of the disk."""
        return await self._transport.run(disk_usage_plan)

    async def check(self, *, repair: bool = False, deep: bool = False) -> Checked:
        """Read all that the daemon keeps and compare it with its catalog, and its guests with both.

        Takes as long as reading all saved memory takes; guests go on meanwhile. Ending the call
        ends the check.

        :param repair: do what is safe about what is found; without, nothing is changed.
        :param deep: read sealed layers whole, too.
        """
        return await self._transport.run(lambda: check_plan(repair=repair, deep=deep))

    async def close(self) -> None:
        """Close the connection. Calls that are under way are cancelled."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()
