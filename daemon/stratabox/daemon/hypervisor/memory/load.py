"""Has a QEMU that was started with saved memory take it.

RAM needs no loading, it is mapped; the devices' state is read by QEMU when it is told to. Then the
guest stands still at the instant of its snapshot: what must be put right from outside is put right
now, and then `Domain.cont` lets it go on.
"""

from __future__ import annotations

import asyncio
import contextlib

from stratabox.daemon.hypervisor import process
from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.qmp import ReplyLostError
from stratabox.storage.model.errors import FailedError, InternalError

LOAD_SECONDS = 60.0

_PAUSE = 0.001


async def load_devices(domain: Domain, *, wired: bool, seconds: float = LOAD_SECONDS) -> None:
    """Return when the devices have their saved state; the vCPUs are stopped.

    :param wired: its machine has an uplink.
    :raise FailedError: QEMU_FAILED, when QEMU does not take the state. Before 9.1 it ends then,
        and says why only on its standard error.
    :raise UnavailableError: MONITOR_UNAVAILABLE.
    """
    waiting = asyncio.ensure_future(_load(domain, wired=wired))
    try:
        async with asyncio.timeout(seconds):
            await asyncio.wait((waiting, domain.exited), return_when=asyncio.FIRST_COMPLETED)
    except TimeoutError:
        raise _failed(domain, f"did not load its saved state within {seconds:g} s") from None
    finally:
        waiting.cancel()
        await asyncio.wait((waiting,))
    if domain.exited.done() and waiting.cancelled():
        raise _failed(domain, "ended while it loaded its saved state")
    if waiting.result() != "completed":
        raise _failed(domain, "could not load its saved state")


async def _load(domain: Domain, *, wired: bool) -> str:
    source = domain.handle.incoming
    if source is None:
        raise InternalError("this domain was not started from saved memory")
    with contextlib.suppress(ReplyLostError):  # it may end before it replies, and that is seen
        await domain.memory.begin_load(source, wired=wired)
    while True:
        status = await domain.memory.load_status()
        if status in ("completed", "failed"):
            return status
        await asyncio.sleep(_PAUSE)  # QEMU tells it by an event only where asked to, and later


def _failed(domain: Domain, what: str) -> FailedError:
    words = process.log_tail(domain.handle.folder)
    return FailedError(f"QEMU {what}. {words}".strip(), reason="QEMU_FAILED")
