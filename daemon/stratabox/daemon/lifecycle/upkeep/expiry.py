"""What is due by the clock: snapshots and sandboxes whose time is up, schedules, old keys.

What was due while the daemon was away is due at its start. The wall clock counts, on purpose: a
sandbox that was to end at noon is over when a host wakes up in the afternoon.

Each sandbox is seen to by a task of its own, which waits for the sandbox's lock: a slow one holds
up nothing but itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import timedelta

from stratabox.daemon.lifecycle.common.threads import undone_by
from stratabox.daemon.lifecycle.running import parking
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.sandboxes import Sandboxes
from stratabox.daemon.lifecycle.snapshots import Snapshots
from stratabox.daemon.lifecycle.upkeep import farewell
from stratabox.daemon.lifecycle.upkeep.scheduling import Scheduling
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import idempotency, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.files.durable import host_error
from stratabox.storage.model.errors import NoSpaceError, NotFoundError, StrataboxError
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Sandbox, Snapshot
from stratabox.storage.model.states import SandboxState, TimeoutAction

log = logging.getLogger(__name__)

PERIOD = 5.0
"""Seconds between two looks; an expiry is late by at most this."""
RETRY_SECONDS = 60.0
"""After how long it is tried again to save a guest whose memory had no room on the disk."""

PARKED = "paused to disk: its time was up"


class Expiry:
    """Looks again and again for what is due."""

    def __init__(
        self, world: World, guests: Guests, sandboxes_: Sandboxes, snapshots_: Snapshots
    ) -> None:
        self._world = world
        self._guests = guests
        self._sandboxes = sandboxes_
        self._snapshots = snapshots_
        self._busy: set[SandboxId] = set()
        self._scheduling = Scheduling(world, snapshots_)
        self._not_before: dict[SandboxId, float] = {}
        """By the monotonic clock: who waits for another try."""

    async def run(self) -> None:
        """Look again and again, until cancelled. What was due before comes first."""
        for sandbox in await self._world.read(sandboxes.that_keep_some):
            # A daemon that was killed may not have come to it after its last snapshot.
            await self._snapshots.keep_last(sandbox)
        while True:
            try:
                await self.look()
            except (StrataboxError, OSError) as error:
                log.warning("what has expired stays for now: %s", error)
            await asyncio.sleep(PERIOD)

    async def look(self) -> None:
        """Look once. Sandboxes are seen to in the background."""
        kept = timedelta(hours=self._world.config.idempotency_hours)
        await self._world.write(lambda tx: idempotency.expire(tx, kept))
        for sandbox in await self._world.read(sandboxes.expired):
            if sandbox in self._busy or self._not_before.get(sandbox, 0) > time.monotonic():
                continue
            self._busy.add(sandbox)
            self._world.tasks.spawn(self._see_to(sandbox), f"expiry of {sandbox}")
        for snapshot in await self._world.read(snapshots.expired):
            # What needs it right now has it stay until the next look.
            if await self._snapshots.delete_due(snapshot, _has_expired):
                log.info("snapshot %s has expired", snapshot)
        await self._scheduling.look()

    async def _see_to(self, sandbox: SandboxId) -> None:
        self._not_before.pop(sandbox, None)
        try:
            guest = self._guests.of(sandbox)
            action = await self._action(sandbox)
            if action is TimeoutAction.SNAPSHOT and await self._is_captured(guest):
                action = await self._action(sandbox, TimeoutAction.TERMINATE)
            if action is TimeoutAction.TERMINATE:
                await self._sandboxes.end(sandbox)
                log.info("sandbox %s is terminated: its time was up", sandbox)
                return
            async with guest.lock:
                if await self._action(sandbox) is TimeoutAction.PAUSE:
                    await self._pause(guest)
            await self._world.sweep()
        except NotFoundError:
            pass  # deleted meanwhile
        except (StrataboxError, OSError) as error:
            log.warning("sandbox %s, whose time is up, stays for now: %s", sandbox, error)
        finally:
            self._busy.discard(sandbox)

    async def _action(
        self, sandbox: SandboxId, instead: TimeoutAction | None = None
    ) -> TimeoutAction | None:
        """What is to be done to it now; None: nothing any more, or not yet.

        Asked again once it is its turn: somebody may have given it more time.

        :param instead: for one whose action is `snapshot`.
        """

        def look(tx: Transaction) -> TimeoutAction | None:
            if sandbox not in sandboxes.expired(tx):
                return None
            action = sandboxes.get(tx, sandbox).on_timeout
            return instead if instead and action is TimeoutAction.SNAPSHOT else action

        return await self._world.read(look)

    async def _is_captured(self, guest: Guest) -> bool:
        """Take the snapshot that is kept of it; where there can be none, pause it instead.

        :return: whether there is one; otherwise it is paused by now, or is looked at again.
        """
        async with guest.lock:
            if await self._action(guest.id) is not TimeoutAction.SNAPSHOT:
                return False
            record = await guest.record()
            if not record.answers and await self._may_answer_yet(record):
                log.info("sandbox %s, whose time is up, is starting: next time", guest.id)
                return False
            try:
                await farewell.take(self._world, self._snapshots, guest)
            except StrataboxError as error:
                log.warning("no snapshot at the timeout of %s: %s", guest.id, error.message)
                await self._pause(guest, f"no snapshot could be taken ({error.message})")
                return False
        return True

    async def _pause(self, guest: Guest, because: str = "") -> None:
        """Pause it, to disk if that can be. It is never ended instead. The lock is held.

        :param because: why it is paused, where that is not what was asked for.
        """
        record = await guest.record()
        if not record.has_process:
            nothing = "" if record.ram_parked else "nothing to pause"
            await self._note(record, ", ".join(part for part in (because, nothing) if part))
            return
        failure: StrataboxError
        try:
            reason = f"{PARKED}, and {because}" if because else PARKED
            await parking.park(self._world, guest, reason=reason, expires_at=None)
            return
        except OSError as error:
            failure = host_error(error)
        except StrataboxError as error:
            failure = error
        if failure.reason == "GUEST_BOOTING" and await self._may_answer_yet(record):
            log.info("sandbox %s, whose time is up, is starting: next time", guest.id)
            return
        await self._hold(guest, record, failure, again=isinstance(failure, NoSpaceError))

    async def _may_answer_yet(self, record: Sandbox) -> bool:
        """It runs, and its agent has had no more time than an agent may take."""
        if record.state is not SandboxState.RUNNING or record.started_at is None:
            return False
        limit = record.started_at + timedelta(seconds=self._world.config.ready_timeout)
        return await self._world.read(lambda tx: tx.now < limit)

    async def _hold(
        self, guest: Guest, record: Sandbox, error: StrataboxError, *, again: bool
    ) -> None:
        """Pause it in memory, where its memory cannot be saved; say so, and why.

        :param again: another try to save it may do better; then its expiry stays.
        """
        log.warning("sandbox %s is paused in memory: %s", guest.id, error.message)
        changes: dict[str, object] = {
            "state": SandboxState.PAUSED,
            "state_reason": f"paused in memory: its time was up, and {error.message}",
        }
        if again:
            self._not_before[guest.id] = time.monotonic() + RETRY_SECONDS
        else:
            changes["expires_at"] = None
        domain = guest.domain
        if domain is None:
            return  # its end, which was why, is being written down
        if record.state is SandboxState.PAUSED:
            await self._world.change_sandbox(guest.id, **changes)
            return
        async with undone_by(domain.cont):
            await domain.pause()
            await self._world.change_sandbox(guest.id, **changes)

    async def _note(self, record: Sandbox, what: str) -> None:
        """Nothing was done; its time is over all the same."""

        def reason(tx: Transaction) -> str:
            old = sandboxes.get(tx, record.id).state_reason
            said = f"its time was up: {what}" if what else ""
            return "; ".join(part for part in (old, said) if part)

        await self._world.change_sandbox(
            record.id, expires_at=None, state_reason=await self._world.read(reason)
        )


def _has_expired(tx: Transaction, record: Snapshot) -> bool:
    return record.expires_at is not None and record.expires_at <= tx.now
