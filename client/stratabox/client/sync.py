"""The SDK for programs that wait: `Client`, its three resources, and `Sandbox`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Concatenate, Self

import grpc

from stratabox.client import _convert, _wire
from stratabox.client._host import host_plan
from stratabox.client._images import ImagePlans
from stratabox.client._plans import (
    Call,
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
from stratabox.client._sandboxes import SandboxPlans
from stratabox.client._snapshots import SnapshotPlans
from stratabox.client.addresses import default_address, grpc_target
from stratabox.client.errors import InternalError, SandboxNotFoundError, StrataboxError
from stratabox.client.records import Host, SandboxRecord
from stratabox.v1 import records_pb2


class Transport:
    """Carries plans out over one channel, and waits for them."""

    def __init__(self, address: str, timeout: float | None) -> None:
        self._address = address
        self._timeout = timeout
        self.channel = grpc.insecure_channel(grpc_target(address), options=_wire.CHANNEL_OPTIONS)
        self._stubs = _wire.stubs(self.channel)
        self._carriers: dict[type, Callable[[Any], Any]] = {
            Call: self._call,
            Fold: self._fold,
            Upload: self._upload,
            Script: self._script,
        }

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

    def _rpc(self, plan: Call[R] | Fold[R] | Upload[R] | Stream[R]) -> Any:
        return getattr(self._stubs[plan.service], plan.rpc)

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

    def _script(self, plan: Script[R]) -> R:
        answer: Any = None
        try:
            while True:
                answer = self._run(plan.steps.send(answer))
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
    watch = _watch(SandboxPlans[Sandbox].watch)


class Snapshots(_Resource):
    """Taking, keeping and restoring snapshots; see `SnapshotPlans`."""

    create = _method(SnapshotPlans[Sandbox].create)
    get = _method(SnapshotPlans[Sandbox].get)
    list_page = _method(SnapshotPlans[Sandbox].list_page)
    list = _method(SnapshotPlans[Sandbox].list)
    update = _method(SnapshotPlans[Sandbox].update)
    delete = _method(SnapshotPlans[Sandbox].delete)
    restore = _method(SnapshotPlans[Sandbox].restore)
    wait_ready = _method(SnapshotPlans[Sandbox].wait_ready)
    watch = _watch(SnapshotPlans[Sandbox].watch)


class Images(_Resource):
    """Building, importing and removing images; see `ImagePlans`."""

    build_debian = _method(ImagePlans.build_debian)
    build_tiny = _method(ImagePlans.build_tiny)
    import_file = _method(ImagePlans.import_file)
    get = _method(ImagePlans.get)
    list_page = _method(ImagePlans.list_page)
    list = _method(ImagePlans.list)
    delete = _method(ImagePlans.delete)


class Client:
    """A connection to the daemon. Threads may share it. Close it, or use it with `with`.

    :param address: `unix:///path` or `http://host:port`; None: found as `addresses` says.
    :param timeout: Seconds that one call may take, on top of what the call itself was told to
        wait; None: no limit. `watch`, image builds and imports have none.
    :raise InvalidAddressError: when the address makes no sense.
    """

    def __init__(self, address: str | None = None, timeout: float | None = None) -> None:
        self.address = address or default_address()
        self._transport = Transport(self.address, timeout)
        self.sandboxes = Sandboxes(SandboxPlans(self._sandbox), self._transport)
        self.snapshots = Snapshots(SnapshotPlans(self._sandbox), self._transport)
        self.images = Images(ImagePlans(), self._transport)

    def _sandbox(self, message: records_pb2.Sandbox) -> Sandbox:
        return Sandbox(_client=self, **_convert.sandbox_fields(message))

    def host(self) -> Host:
        """Return what the daemon is and uses."""
        return self._transport.run(host_plan)

    def close(self) -> None:
        """Close the connection. Calls that are under way are cancelled."""
        self._transport.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
