"""The use cases of serial consoles. What listens to each is its domain's `hypervisor.console`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from stratabox.daemon.hypervisor.console import Console, Heard
from stratabox.daemon.hypervisor.console_log import ConsoleLog
from stratabox.daemon.lifecycle.common.ending import until_end
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.model.errors import InvalidArgumentError, UnavailableError

TYPED_BYTES = 64 << 10
"""That may be typed at once."""


async def kept(world: World, guest: Guest) -> bytes:
    """All that is kept of a console, oldest first, also of a guest that has ended."""
    if guest.domain is not None and guest.domain.console.is_open:
        return await guest.domain.console.kept()
    log = ConsoleLog(world.store.layout.sandbox(guest.id), world.config.console_log)
    return await in_thread(log.read)


async def follow(world: World, guest: Guest, *, from_log: bool) -> AsyncIterator[Heard]:
    """What the guest writes from now on, until its process ends; nothing first, once it began.

    :param from_log: all that is kept comes first, without a gap.
    :raise DeniedError: INVALID_STATE, when it has no process.
    :raise UnavailableError: CONSOLE_UNAVAILABLE.
    :raise DaemonEndingError: when the daemon ends.
    """
    console = _require(guest)
    heard = console.follow(from_log=from_log)
    async for each in until_end(world.bus, heard):
        yield each


async def write(guest: Guest, data: bytes) -> None:
    """Type something into a console; returns when all of it was taken.

    :raise InvalidArgumentError: when it is too much at once.
    :raise DeniedError: INVALID_STATE, when it has no process.
    :raise UnavailableError: CONSOLE_UNAVAILABLE, CONSOLE_NOT_READ.
    """
    if len(data) > TYPED_BYTES:
        raise InvalidArgumentError(
            f"{len(data)} bytes cannot be typed at once; at most {TYPED_BYTES} can", field="data"
        )
    await _require(guest).write(data)


def _require(guest: Guest) -> Console:
    console = guest.require_domain().console
    if not console.is_open:
        raise UnavailableError(
            f"the console of sandbox {guest.id} is not connected: its QEMU was started before"
            " there were consoles; stop and start it",
            reason="CONSOLE_UNAVAILABLE",
            sandbox=guest.id,
        )
    return console
