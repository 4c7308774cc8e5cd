"""The SDK for asyncio: `AsyncClient`, its three resources, and `AsyncSandbox`.

Line for line the sibling of `sync`; what can be said once is said in the plans.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Concatenate, Self

import grpc
import grpc.aio

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
    """Carries plans out over one channel, and awaits them.

    The channel is opened at the first call, because it belongs to the loop that runs then.
    """

    def __init__(self, address: str, timeout: float | None) -> None:
        self._address = address
        self._target = grpc_target(address)
        self._timeout = timeout
        self._channel: grpc.aio.Channel | None = None
        self._stubs: dict[str, Any] = {}
        self._carriers: dict[type, Callable[[Any], Awaitable[Any]]] = {
            Call: self._call,
            Fold: self._fold,
            Upload: self._upload,
            Script: self._script,
        }

    async def close(self) -> None:
        """Close the channel, where there is one."""
        if self._channel is not None:
            await self._channel.close()

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

    def _rpc(self, plan: Call[R] | Fold[R] | Upload[R] | Stream[R]) -> Any:
        if self._channel is None:
            options = _wire.CHANNEL_OPTIONS
            self._channel = grpc.aio.insecure_channel(self._target, options=options)
            self._stubs = _wire.stubs(self._channel)
        return getattr(self._stubs[plan.service], plan.rpc)

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

    async def _script(self, plan: Script[R]) -> R:
        answer: Any = None
        try:
            while True:
                answer = await self._run(plan.steps.send(answer))
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
    watch = _watch(SandboxPlans[AsyncSandbox].watch)


class AsyncSnapshots(_Resource):
    """Taking, keeping and restoring snapshots; see `SnapshotPlans`."""

    create = _method(SnapshotPlans[AsyncSandbox].create)
    get = _method(SnapshotPlans[AsyncSandbox].get)
    list_page = _method(SnapshotPlans[AsyncSandbox].list_page)
    list = _method(SnapshotPlans[AsyncSandbox].list)
    update = _method(SnapshotPlans[AsyncSandbox].update)
    delete = _method(SnapshotPlans[AsyncSandbox].delete)
    restore = _method(SnapshotPlans[AsyncSandbox].restore)
    wait_ready = _method(SnapshotPlans[AsyncSandbox].wait_ready)
    watch = _watch(SnapshotPlans[AsyncSandbox].watch)


class AsyncImages(_Resource):
    """Building, importing and removing images; see `ImagePlans`."""

    build_debian = _method(ImagePlans.build_debian)
    build_tiny = _method(ImagePlans.build_tiny)
    import_file = _method(ImagePlans.import_file)
    get = _method(ImagePlans.get)
    list_page = _method(ImagePlans.list_page)
    list = _method(ImagePlans.list)
    delete = _method(ImagePlans.delete)


class AsyncClient:
    """A connection to the daemon, for one event loop. Close it, or use it with `async with`.

    :param address: `unix:///path` or `http://host:port`; None: found as `addresses` says.
    :param timeout: Seconds that one call may take, on top of what the call itself was told to
        wait; None: no limit. `watch`, image builds and imports have none.
    :raise InvalidAddressError: when the address makes no sense.
    """

    def __init__(self, address: str | None = None, timeout: float | None = None) -> None:
        self.address = address or default_address()
        self._transport = Transport(self.address, timeout)
        self.sandboxes = AsyncSandboxes(SandboxPlans(self._sandbox), self._transport)
        self.snapshots = AsyncSnapshots(SnapshotPlans(self._sandbox), self._transport)
        self.images = AsyncImages(ImagePlans(), self._transport)

    def _sandbox(self, message: records_pb2.Sandbox) -> AsyncSandbox:
        return AsyncSandbox(_client=self, **_convert.sandbox_fields(message))

    async def host(self) -> Host:
        """Return what the daemon is and uses."""
        return await self._transport.run(host_plan)

    async def close(self) -> None:
        """Close the connection. Calls that are under way are cancelled."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()
