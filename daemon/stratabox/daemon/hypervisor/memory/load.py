"""Waits until a QEMU that was started with saved memory has it.

RAM needs no loading, it is mapped; the devices' state is read by QEMU as it starts. On return the
guest stands still at the instant of its snapshot: what must be put right from outside is put right
now, and then `Domain.cont` lets it go on.
"""

from __future__ import annotations

import asyncio

from stratabox.daemon.hypervisor import process
from stratabox.daemon.hypervisor.domain import Domain
from stratabox.storage.model.errors import FailedError

LOAD_SECONDS = 60.0

_PAUSE = 0.001


async def wait_loaded(domain: Domain, seconds: float = LOAD_SECONDS) -> None:
    """Return when the devices have their saved state; the vCPUs are stopped.

    :raise FailedError: QEMU_FAILED, when QEMU does not take the state. Before 9.1 it ends then,
        and says why only on its standard error.
    :raise UnavailableError: MONITOR_UNAVAILABLE.
    """
    waiting = asyncio.ensure_future(_poll(domain))
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


async def _poll(domain: Domain) -> str:
    while True:
        status = await domain.memory.load_status()
        if status in ("completed", "failed"):
            return status
        await asyncio.sleep(_PAUSE)  # QEMU tells it by an event only where asked to, and later


def _failed(domain: Domain, what: str) -> FailedError:
    words = process.log_tail(domain.handle.folder)
    return FailedError(f"QEMU {what}. {words}".strip(), reason="QEMU_FAILED")
