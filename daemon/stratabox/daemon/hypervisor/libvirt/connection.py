"""The connection to libvirtd: made when needed, lost, and made again.

libvirt's calls block, so each runs in a thread of its own; and so libvirt's own event loop runs in
a thread too. (libvirtaio would use asyncio's, by `add_reader` and `ensure_future` in whatever
thread makes a call, because libvirt's client changes what it watches with each; those are for the
loop's own thread alone.) It sends keep-alives: a libvirtd that hangs is hung up on after
`HUNG_SECONDS`, and every call that waits for it ends in an error.

A thread that libvirtd keeps waiting for ever is left behind; at most one opens a connection at any
time, and others end with the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from stratabox.daemon.hypervisor import process
from stratabox.storage.model.errors import DeniedError, FailedError, UnavailableError

OPEN_SECONDS = 20.0
CALL_SECONDS = 30.0
_ALIVE_SECONDS = 5
_ALIVE_COUNT = 3
HUNG_SECONDS = _ALIVE_SECONDS * _ALIVE_COUNT

T = TypeVar("T")
log = logging.getLogger(__name__)


class Connection:
    """libvirtd by one URI.

    :param on_lost: called in the event loop when an open connection has ended by itself.
    :param on_lifecycle: called in the event loop with a domain's uuid, what happened to it, and
        why, both as libvirt numbers them.
    """

    def __init__(
        self,
        uri: str,
        *,
        on_lost: Callable[[], None] = lambda: None,
        on_lifecycle: Callable[[str, int, int], None] = lambda uuid, event, detail: None,
    ) -> None:
        self._uri = uri
        self._on_lost = on_lost
        self._on_lifecycle = on_lifecycle
        self._connected: _Connected | None = None
        self._opening: asyncio.Future[_Connected] | None = None
        self._closed = False

    async def call(self, work: Callable[[Any], T], seconds: float = CALL_SECONDS) -> T:
        """Run `work` with an open virConnect, in a thread.

        When this is cancelled, or takes longer, the thread goes on and its result is dropped.

        :raise UnavailableError: LIBVIRT_UNAVAILABLE, when libvirtd is not there, refuses the
            connection, does not answer in time, or went away meanwhile.
        :raise FailedError: LIBVIRT_REFUSED, when libvirt refuses, in its words; `code` its number.
        :raise DeniedError: TOOL_MISSING, when libvirt's Python module is not installed.
        """
        module = load_module()
        connection = await self._open(module)
        try:
            async with asyncio.timeout(seconds):
                return await in_own_thread(lambda: work(connection))
        except TimeoutError:
            raise self._unavailable(f"gave no answer in {seconds:g} s") from None
        except module.libvirtError as error:
            words = process.printable(str(error))
            if await in_own_thread(partial(_is_over, module, connection, error)):
                raise self._unavailable(f"went away: {words}") from error
            raise FailedError(
                f"libvirt refuses: {words}", reason="LIBVIRT_REFUSED", code=error.get_error_code()
            ) from error

    async def close(self) -> None:
        """Hang up. No call may follow."""
        self._closed = True
        connected, self._connected = self._connected, None
        if connected is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CALL_SECONDS):
                    await in_own_thread(connected.hang_up)

    async def _open(self, module: Any) -> Any:
        if self._connected is not None:
            return self._connected.connection
        if self._opening is None:
            start_events()
            loop = asyncio.get_running_loop()
            self._opening = in_own_thread(lambda: self._connect(module, loop))
            self._opening.add_done_callback(self._opened)
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                return (await asyncio.shield(self._opening)).connection
        except TimeoutError:
            raise self._unavailable(f"gave no answer in {OPEN_SECONDS:g} s") from None
        except module.libvirtError as error:
            raise self._unavailable(
                f"cannot be reached: {process.printable(str(error))}"
            ) from error

    def _opened(self, opening: asyncio.Future[_Connected]) -> None:
        self._opening = None
        if opening.cancelled() or opening.exception() is not None:
            return
        connected = opening.result()
        if self._closed or connected.lost:
            in_own_thread(connected.hang_up)
        else:
            self._connected = connected

    def _connect(self, module: Any, loop: asyncio.AbstractEventLoop) -> _Connected:
        connected = _Connected(module, module.open(self._uri))

        def tell(callback: Callable[..., None], *what: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know
                loop.call_soon_threadsafe(callback, *what)

        try:
            connected.connection.setKeepAlive(_ALIVE_SECONDS, _ALIVE_COUNT)
            connected.connection.registerCloseCallback(lambda *_: tell(self._lost, connected), None)
            connected.events = connected.connection.domainEventRegisterAny(
                None,
                module.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
                lambda _, domain, event, detail, __: tell(
                    self._on_lifecycle, domain.UUIDString(), event, detail
                ),
                None,
            )
        except BaseException:
            connected.hang_up()
            raise
        return connected

    def _lost(self, connected: _Connected) -> None:
        connected.lost = True
        if self._connected is connected:
            self._connected = None
            in_own_thread(connected.hang_up)
            self._on_lost()

    def _unavailable(self, what: str) -> UnavailableError:
        return UnavailableError(
            f"libvirt at {self._uri} {what}. Guests that run are not touched by that; "
            "`strataboxd doctor` tells what is missing.",
            reason="LIBVIRT_UNAVAILABLE",
        )


def in_own_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run it in a thread that nothing waits for when the process ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
            future.exception()  # seen: whoever waits gets it, and nobody has to
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="libvirt", daemon=True).start()
    return future


@functools.cache
def load_module() -> Any:
    """libvirt's Python module.

    :raise DeniedError: TOOL_MISSING, when it is not installed.
    """
    try:
        import libvirt
    except ImportError:
        raise DeniedError(
            "libvirt's Python module is not installed; `strataboxd doctor` says how to get it.",
            reason="TOOL_MISSING",
            tool="libvirt-python",
        ) from None
    # By default libvirt prints each error on stderr besides raising it.
    libvirt.registerErrorHandler(lambda *_: None, None)
    return libvirt


@functools.cache
def start_events() -> None:
    """Run libvirt's event loop, once in a process: it must be there before the first connection."""
    module = load_module()
    module.virEventRegisterDefaultImpl()
    # One that wakes up by itself: else it would not notice what is added while it sleeps.
    module.virEventAddTimeout(60_000, lambda *_: None, None)

    def run() -> None:
        while True:
            module.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt events", daemon=True).start()


def _is_over(module: Any, connection: Any, error: Any) -> bool:
    if error.get_error_domain() == module.VIR_FROM_RPC:
        return True
    try:
        return not connection.isAlive()
    except module.libvirtError:
        return True


class _Connected:
    """An open virConnect and what was registered with it."""

    def __init__(self, module: Any, connection: Any) -> None:
        self._module = module
        self.connection = connection
        self.events: int | None = None
        self.lost = False

    def hang_up(self) -> None:
        """Blocks until libvirtd has let go, if it is there."""
        refused = self._module.libvirtError  # by one that is gone
        if self.events is not None:
            with contextlib.suppress(refused):
                self.connection.domainEventDeregisterAny(self.events)
        with contextlib.suppress(refused):
            self.connection.unregisterCloseCallback()
        with contextlib.suppress(refused):
            self.connection.close()
