"""Waiting for a guest to become ready, and saying why it did not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from stratabox.daemon.lifecycle.running.readiness import Readiness
from stratabox.daemon.lifecycle.seeding import outcome
from stratabox.storage.model.errors import ConflictError, FailedError, UnavailableError

if TYPE_CHECKING:
    from stratabox.daemon.lifecycle.running.guest import Guest


async def until_ready(guest: Guest, readiness: Readiness, timeout: float) -> None:
    """Return when it is; raises as `Guest.wait_ready`."""
    domain = guest.domain
    if domain is None:
        sandbox = await guest.record()
        raise ConflictError(
            f"sandbox {sandbox.name!r} is {sandbox.state} ({sandbox.state_reason})",
            reason="INTERRUPTED",
            sandbox=guest.id,
        )
    ready = asyncio.create_task(readiness.wait())
    try:
        either: set[asyncio.Future[Any]] = {ready, domain.exited}
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if domain.exited.cancelled():
            raise ConflictError(
                "the sandbox was ended before its agent answered",
                reason="INTERRUPTED",
                sandbox=guest.id,
            )
        if domain.exited.done():
            raise FailedError(
                f"the guest ended before its agent answered: {domain.exited.result().reason}",
                reason="GUEST_ENDED",
                sandbox=guest.id,
            )
        if unready := readiness.probe_failed(timeout):
            raise unready
        if not ready.done():
            raise UnavailableError(
                f"{readiness.waits_for or outcome.NO_ANSWER} within {timeout:g} s; its"
                " console says:"
                f" {guest.last_words() or '(nothing)'}",
                reason="AGENT_UNAVAILABLE",
                sandbox=guest.id,
            )
    finally:
        ready.cancel()
    if readiness.problem is not None:
        raise readiness.problem
