"""Ending a freeze of a guest's file systems, whoever began it."""

from __future__ import annotations

import logging

from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.lifecycle.running import reasons
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.storage.model.errors import StrataboxError

log = logging.getLogger(__name__)

THAW_SECONDS = 60.0
"""How long a guest is asked to thaw before it is given up."""


async def thaw(agent: GuestAgent) -> int | None:
    """Thaw all file systems, whatever it takes; how many were, where the agent said so.

    The guest may hang without it, so this goes on, with new connections, for as long as the agent
    may need to come back. A guest that does not answer even then is logged, and stays as it is.
    """
    count: int | None
    try:
        count = await agent.fsfreeze_thaw()
    except StrataboxError:
        count = None
    try:
        await agent.ensure_thawed(THAW_SECONDS)
    except StrataboxError as error:
        log.error("%s", error)
        return None
    return count


async def thaw_after_full_disk(guest: Guest, reason: str) -> None:
    """End a freeze that a full disk came between, once the guest runs; nobody could before that.

    The lock is held, so that no freeze is under way. Without one this changes nothing.

    :param reason: why it had stood still.
    """
    if reasons.is_full(reason) and guest.is_ready:
        await thaw(guest.require_agent())
