"""The last snapshot of a sandbox whose time is up and whose `on_timeout` is `snapshot`.

At the strongest level that can be had: what fails at one level is tried at the next. Its name and
metadata say what it is. A daemon that is killed between it and the end of the sandbox finds it at
its next start by that, and takes no second one.
"""

from __future__ import annotations

import logging

from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.saving import is_readable
from stratabox.daemon.lifecycle.snapshots import NewSnapshot, Snapshots
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import snapshots
from stratabox.storage.catalog.database import Transaction, text_of
from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import StrataboxError
from stratabox.storage.model.records import Sandbox, Snapshot
from stratabox.storage.model.states import Level, SandboxState, SnapshotState

log = logging.getLogger(__name__)

AT_TIMEOUT = "stratabox.timeout"
"""Metadata of such a snapshot: the `expires_at` that its sandbox had."""


async def take(world: World, taker: Snapshots, guest: Guest) -> Snapshot:
    """The snapshot that is kept of a sandbox whose time is up. The lock is held.

    :raise StrataboxError: when there is none at any level; it tells of the weakest.
    """
    record = await guest.record()
    stamp = text_of(record.expires_at) or ""
    before = await world.read(lambda tx: _find(tx, record, stamp))
    if before is not None:
        return before
    name = f"at the timeout of {record.name}"[: policy.NAME_BYTES // 4]
    levels = await _levels(record, guest)
    for level in levels:
        wanted = NewSnapshot(name=name, level=level, metadata={AT_TIMEOUT: stamp})
        try:
            taken = await taker.take_locked(guest, wanted)
            break
        except StrataboxError as error:
            if level is levels[-1]:
                raise
            log.warning("no %s snapshot at the timeout of %s: %s", level, guest.id, error.message)
    hit("farewell.snapshot-taken")
    return taken


def _find(tx: Transaction, sandbox: Sandbox, stamp: str) -> Snapshot | None:
    wanted = snapshots.Filter(
        source=sandbox.id, states=[SnapshotState.READY], metadata={AT_TIMEOUT: stamp}
    )
    found, _ = snapshots.list_page(tx, wanted)
    return found[0] if found else None


async def _levels(record: Sandbox, guest: Guest) -> list[Level]:
    """What the state allows, the strongest first."""
    running = record.state is SandboxState.RUNNING
    found = []
    if (
        policy.why_not(Level.MEMORY, record) is None
        and policy.is_past_boot(record)
        # Of one that is paused to disk nothing needs to be read.
        and (not record.has_process or await is_readable(guest))
    ):
        found.append(Level.MEMORY)
    if policy.why_not(Level.APPLICATION, record) is None and (
        not running or await guest.agent_answers()
    ):
        found.append(Level.APPLICATION)
    return [*found, Level.CRASH]
