"""The SDK for programs that wait: `Client`, its resources, and `Sandbox`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Concatenate, Self

import grpc

from stratabox.client import _convert, _dial, _wire
from stratabox.client._access import Access, Pair, access
from stratabox.client._dial import Connection
from stratabox.client._events_faces import Events
from stratabox.client._files_sync import Files, SandboxFiles
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
from stratabox.client._ports_sync import (
    SandboxPorts,
    SandboxSsh,
    dial,
    ports_of,
    ports_of_sandbox,
    ssh_of,
    ssh_of_sandbox,
)
from stratabox.client._process_faces import Process
from stratabox.client._process_resources import Processes, SandboxProcesses
from stratabox.client._processes import Words
from stratabox.client._requests import Seconds
from stratabox.client._sandboxes import SandboxPlans
from stratabox.client._snapshots import SnapshotPlans
from stratabox.client._volumes import VolumePlans
from stratabox.client._workspace_faces import Workspaces
from stratabox.client.addresses import default_address
from stratabox.client.errors import InternalError, SandboxNotFoundError, StrataboxError
from stratabox.client.host_records import DiskUsage, Host
from stratabox.client.process_records import Terminal
from stratabox.client.records import Checked, SandboxRecord
from stratabox.v1 import records_pb2


class Transport:
    """Carries plans out over one channel, and waits for them."""

    def __init__(self, access: Access, timeout: float | None) -> None:
        self._access = access
        self._address = access.address
        self._timeout = timeout
        self.channel = access.channel(grpc, _wire.CHANNEL_OPTIONS)
        self._stubs = _wire.stubs(self.channel, access)
        self._carriers: dict[type, Callable[[Any], Any]] = {
            Call: self._call,
            Fold: self._fold,
            Upload: self._upload,
            Download: self._download,
            Script: self._script,
        }

    @property
    def address(self) -> str:
        """Of the daemon."""
        return self._address

    def stub(self, service: str, rpc: str) -> Any:
        """Return a method of gRPC's own, for what no plan can say."""
        return getattr(self._stubs[service], rpc)

    def run(self, build: Callable[[], Plan[R]]) -> R:
        """Make a plan, carry it out, and return its result.

        :raise StrataboxError: what the plan documents.
        """
        return self._run(build())

    def _run(self, plan: Plan[R]) -> R:
        result: R = self._carriers[type(plan)](plan)
        return result

    def stream(self, build: Callable[[], Stream[R]]) -> Iterator[R]:
        """Begin to follow a stream now; end it when the iterator is closed."""
        plan = build()
        rpc = self._rpc(plan)(plan.request)
        return self._results(rpc, plan.convert)

    def _results(self, rpc: Any, convert: Callable[[Any], R]) -> Iterator[R]:
        try:
            for message in rpc:
                yield convert(message)
        except grpc.RpcError as error:
            raise _wire.unpack(error, self._address) from error
        finally:
            rpc.cancel()

    def _rpc(self, plan: Call[R] | Fold[R] | Upload[R] | Download[R] | Stream[R]) -> Any:
        return self.stub(plan.service, plan.rpc)

    def _call(self, plan: Call[R]) -> R:
        limit = _wire.deadline(self._timeout, plan.waits)
        try:
            return plan.convert(self._rpc(plan)(plan.request, timeout=limit))
        except grpc.RpcError as error:
            raise _wire.unpack(error, self._address) from error

    def _fold(self, plan: Fold[R]) -> R:
        rpc = self._rpc(plan)(plan.request, timeout=plan.timeout)
        try:
            for message in rpc:
                if (result := plan.step(message)) is not None:
                    return result
        except grpc.RpcError as error:
            raise _wire.unpack(error, self._address) from error
        finally:
            rpc.cancel()
        raise InternalError(f"the daemon ended {plan.rpc} without a result")

    def _upload(self, plan: Upload[R]) -> R:
        failed: list[Exception] = []

        def requests() -> Iterator[Any]:
            # gRPC reads this in a thread of its own and forgets what went wrong.
            try:
                yield from plan.requests
            except Exception as error:
                failed.append(error)
                raise

        try:
            return plan.convert(self._rpc(plan)(requests()))
        except grpc.RpcError as error:
            if failed:
                raise failed[0] from None
            raise _wire.unpack(error, self._address) from error

    def _download(self, plan: Download[R]) -> R:
        try:
            rpc = self._rpc(plan)(plan.request)
            try:
                for message in rpc:
                    plan.step(message)
            finally:
                rpc.cancel()
            return plan.finish()
        except grpc.RpcError as error:
            raise _wire.unpack(error, self._address) from error
        finally:
            plan.close()

    def _script(self, plan: Script[R]) -> R:
        answer: Any = None
        failure: StrataboxError | None = None
        try:
            while True:
                send, throw = plan.steps.send, plan.steps.throw
                wanted = send(answer) if failure is None else throw(failure)
                try:
                    answer, failure = self._run(wanted), None
                except StrataboxError as error:
                    failure = error
        except StopIteration as end:
            result: R = end.value
            return result
        finally:
            plan.steps.close()


def _method(build: Callable[Concatenate[Any, P], Plan[R]]) -> Method[P, R]:
    return Method(build)


def _watch(build: Callable[Concatenate[Any, P], Stream[R]]) -> Method[P, Iterator[R]]:
    return Method(build, "stream")


def _own(build: Callable[Concatenate[Any, str, P], Plan[R]]) -> Method[P, R]:
    return Method(build)


def _own_watch(
    build: Callable[Concatenate[Any, str, P], Stream[R]],
) -> Method[P, Iterator[R]]:
    return Method(build, "stream")


@dataclass(frozen=True, kw_only=True)
class Sandbox(SandboxRecord, Face):
    """One guest, as it was when the daemon answered, and what can be done with it.

    A frozen record: every method returns what is new. As a context manager it deletes the sandbox
    at the end of the block.
    """

    _client: Client = field(repr=False, compare=False)

    refresh = _own(SandboxPlans["Sandbox"].get)
    update = _own(SandboxPlans["Sandbox"].update)
    execute = _own(SandboxPlans["Sandbox"].execute)
    pause = _own(SandboxPlans["Sandbox"].pause)
    resume = _own(SandboxPlans["Sandbox"].resume)
    stop = _own(SandboxPlans["Sandbox"].stop)
    start = _own(SandboxPlans["Sandbox"].start)
    terminate = _own(SandboxPlans["Sandbox"].terminate)
    delete = _own(SandboxPlans["Sandbox"].delete)
    snapshot = _own(SandboxPlans["Sandbox"].snapshot)
    clone = _own(SandboxPlans["Sandbox"].clone)
    revert = _own(SandboxPlans["Sandbox"].revert)
    wait_ready = _own(SandboxPlans["Sandbox"].wait_ready)
    attach_volume = _own(SandboxPlans["Sandbox"].attach_volume)
    detach_volume = _own(SandboxPlans["Sandbox"].detach_volume)
    console_log = _own(ObservingPlans.console_log)
    watch_console = _own_watch(ObservingPlans.watch_console)
    write_console = _own(ObservingPlans.write_console)
    metrics = _own(ObservingPlans.metrics)

    @property
    def processes(self) -> SandboxProcesses:
        """Commands that go on in this guest by themselves."""
        return SandboxProcesses(self._carrier()[1], self.id)

    def spawn(
        self,
        command: Words,
        *,
        cwd: str | None = None,
        env: Mapping[str, str | bytes] | None = None,
        user: str | None = None,
        timeout: Seconds | None = None,
        stdin: bool = False,
        terminal: Terminal | bool = False,
    ) -> Process:
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
        return self._client.processes.spawn(
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
    def ports(self) -> SandboxPorts:
        """Connections into this guest, and out of it, that need no network."""
        return ports_of_sandbox(self._carrier()[1], self.id)

    @property
    def ssh(self) -> SandboxSsh:
        """Who may log in to this guest."""
        return ssh_of_sandbox(self._carrier()[1], self.id)

    def dial(self, target: Target) -> Connection:
        """Connect to something that listens in the guest; see `client.ports.dial`."""
        return dial(self._carrier()[1], _dial.to_target(self.id, target))

    @property
    def files(self) -> SandboxFiles:
        """Files in this guest."""
        return SandboxFiles(self._carrier()[1], self.id)

    def _carrier(self) -> tuple[Any, Any, tuple[Any, ...]]:
        plans, transport, _ = self._client.sandboxes._carrier()
        return plans, transport, (self.id,)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.delete()
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


class Sandboxes(_Resource):
    """Creating, using, copying and ending sandboxes; see `SandboxPlans`."""

    create = _method(SandboxPlans[Sandbox].create)
    get = _method(SandboxPlans[Sandbox].get)
    list_page = _method(SandboxPlans[Sandbox].list_page)
    list = _method(SandboxPlans[Sandbox].list)
    update = _method(SandboxPlans[Sandbox].update)
    execute = _method(SandboxPlans[Sandbox].execute)
    pause = _method(SandboxPlans[Sandbox].pause)
    resume = _method(SandboxPlans[Sandbox].resume)
    stop = _method(SandboxPlans[Sandbox].stop)
    start = _method(SandboxPlans[Sandbox].start)
    terminate = _method(SandboxPlans[Sandbox].terminate)
    delete = _method(SandboxPlans[Sandbox].delete)
    snapshot = _method(SandboxPlans[Sandbox].snapshot)
    clone = _method(SandboxPlans[Sandbox].clone)
    revert = _method(SandboxPlans[Sandbox].revert)
    wait_ready = _method(SandboxPlans[Sandbox].wait_ready)
    attach_volume = _method(SandboxPlans[Sandbox].attach_volume)
    detach_volume = _method(SandboxPlans[Sandbox].detach_volume)
    watch = _watch(SandboxPlans[Sandbox].watch)
    console_log = _method(ObservingPlans.console_log)
    watch_console = _watch(ObservingPlans.watch_console)
    write_console = _method(ObservingPlans.write_console)
    metrics = _method(ObservingPlans.metrics)
    list_metrics = _method(ObservingPlans.list_metrics)
    watch_metrics = _watch(ObservingPlans.watch_metrics)


class Snapshots(_Resource):
    """Taking, keeping and restoring snapshots; see `SnapshotPlans`."""

    create = _method(SnapshotPlans[Sandbox].create)
    get = _method(SnapshotPlans[Sandbox].get)
    list_page = _method(SnapshotPlans[Sandbox].list_page)
    list = _method(SnapshotPlans[Sandbox].list)
    update = _method(SnapshotPlans[Sandbox].update)
    delete = _method(SnapshotPlans[Sandbox].delete)
    restore = _method(SnapshotPlans[Sandbox].restore)
    compact = _method(SnapshotPlans[Sandbox].compact)
    export = _method(SnapshotPlans[Sandbox].export)
    import_file = _method(SnapshotPlans[Sandbox].import_file)
    wait_ready = _method(SnapshotPlans[Sandbox].wait_ready)
    watch = _watch(SnapshotPlans[Sandbox].watch)


class Images(_Resource):
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


class Jobs(_Resource):
    """Looking at jobs in the background, holding them and giving them up; see `JobPlans`."""

    list = _method(JobPlans.list)
    get = _method(JobPlans.get)
    pause = _method(JobPlans.pause)
    resume = _method(JobPlans.resume)
    cancel = _method(JobPlans.cancel)


class Volumes(_Resource):
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


class Client:
    """A connection to the daemon. Threads may share it. Close it, or use it with `with`.

    :param address: `unix:///path`, `https://host:port`, or `http://host:port` on this host; None:
        found as `addresses` says.
    :param timeout: Seconds that one call may take, on top of what the call itself was told to
        wait; None: no limit. `watch`, image builds and imports have none.
    :param api_key: Which every TCP address takes; None: STRATABOX_API_KEY.
    :param ca_file: PEM file of the authorities that https addresses are trusted by; None:
        STRATABOX_CA_FILE, else those that gRPC brings.
    :param client_certificate: PEM files of a certificate and its key, where the daemon asks for
        one; None: STRATABOX_CLIENT_CERTIFICATE and STRATABOX_CLIENT_KEY.
    :param workspace: To work in, where the caller is an admin; None: STRATABOX_WORKSPACE, else the
        key's own, or "default".
    :raise InvalidAddressError: when the address makes no sense, or a key would go there in the
        clear.
    :raise UnauthenticatedError: when the API key is none.
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
        self.sandboxes = Sandboxes(SandboxPlans(self._sandbox), self._transport)
        self.snapshots = Snapshots(SnapshotPlans(self._sandbox), self._transport)
        self.images = Images(ImagePlans(), self._transport)
        self.volumes = Volumes(VolumePlans(), self._transport)
        self.jobs = Jobs(JobPlans(), self._transport)
        self.events = Events(self._transport)
        self.files = Files(self._transport)
        self.ports = ports_of(self._transport)
        self.processes = Processes(self._transport)
        self.ssh = ssh_of(self._transport)
        self.workspaces = Workspaces(self._transport)

    def _sandbox(self, message: records_pb2.Sandbox) -> Sandbox:
        return Sandbox(_client=self, **_convert.sandbox_fields(message))

    def host(self) -> Host:
        """Return what the daemon is and uses."""
        return self._transport.run(host_plan)

    def disk_usage(self) -> DiskUsage:
        """Look at all files of the daemon's state folder: what takes how much of the disk."""
        return self._transport.run(disk_usage_plan)

    def check(self, *, repair: bool = False, deep: bool = False) -> Checked:
        """Read all that the daemon keeps and compare it with its catalog, and its guests with both.

        Takes as long as reading all saved memory takes; guests go on meanwhile. Ending the call
        ends the check.

        :param repair: do what is safe about what is found; without, nothing is changed.
        :param deep: read sealed layers whole, too.
        """
        return self._transport.run(lambda: check_plan(repair=repair, deep=deep))

    def close(self) -> None:
        """Close the connection. Calls that are under way are cancelled."""
        self._transport.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
