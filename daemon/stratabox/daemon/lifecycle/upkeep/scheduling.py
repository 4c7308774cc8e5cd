"""Snapshots that are taken by the clock: of each sandbox that has a schedule, while it can be had.

When the next one is due is written in the transaction that begins one, so that none is taken twice,
whenever the daemon is killed. What was due while nobody could take it (the daemon was away, the
sandbox stopped) is taken once, and the schedule stays in step. One that fails is a FAILED record;
one that is refused before there is a record is told of in the sandbox's `state_reason`. Both are
tried again when the next one is due, and not before.
"""

from __future__ import annotations

import logging
from datetime import timedelta

from stratabox.daemon.lifecycle import keeping
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.snapshots import NewSnapshot, Snapshots
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes
from stratabox.storage.catalog.database import Transaction, text_of
from stratabox.storage.model.errors import ConflictError, NotFoundError, StrataboxError
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import SandboxState

log = logging.getLogger(__name__)

MISSED = "no snapshot could be taken when one was due"
"""How a `state_reason` begins that tells of it."""


class Scheduling:
    """Takes what is due; asked again and again by `Expiry`."""

    def __init__(self, world: World, snapshots: Snapshots) -> None:
        self._world = world
        self._snapshots = snapshots
        self._busy: set[SandboxId] = set()

    async def look(self) -> None:
        """Begin what is due, each sandbox in a task of its own; one at a time of each."""
        for sandbox in await self._world.read(sandboxes.due_for_snapshot):
            if sandbox not in self._busy:
                self._busy.add(sandbox)
                self._world.tasks.spawn(self._take(sandbox), f"scheduled snapshot of {sandbox}")

    async def _take(self, sandbox: SandboxId) -> None:
        try:
            record = await self._world.read(lambda tx: sandboxes.get(tx, sandbox))
            if record.schedule is None or await self._may_answer_yet(record):
                return
            await self._snapshots.create(
                sandbox,
                NewSnapshot(
                    name=f"scheduled {record.schedule.next_at:%Y-%m-%d %H:%M:%S}",
                    level=record.schedule.level,
                    metadata={keeping.BY_SCHEDULE: text_of(record.schedule.next_at) or ""},
                    scheduled=True,
                ),
            )
            await self._note(sandbox, "")
        except (NotFoundError, ConflictError) as error:
            log.info("no scheduled snapshot of %s: %s", sandbox, error.message)
        except StrataboxError as error:
            log.warning("no scheduled snapshot of %s: %s", sandbox, error.message)
            await self._note(sandbox, error.message)
        finally:
            self._busy.discard(sandbox)

    async def _may_answer_yet(self, record: Sandbox) -> bool:
        """It starts: what is due is worth more once its agent answers, and waits for that."""
        if record.state is not SandboxState.RUNNING or record.answers or record.started_at is None:
            return False
        limit = record.started_at + timedelta(seconds=self._world.config.ready_timeout)
        return await self._world.read(lambda tx: tx.now < limit)

    async def _note(self, sandbox: SandboxId, failure: str) -> None:
        """Tell of a failure in the record, or take back what was told; go on with the next one."""

        def write(tx: Transaction) -> Sandbox | None:
            try:
                record = sandboxes.get(tx, sandbox)
            except NotFoundError:
                return None
            changes: dict[str, object] = {}
            if record.schedule and failure and record.schedule.next_at <= tx.now:
                # Refused before it was begun; otherwise that is written, and the record tells why.
                changes["schedule"] = keeping.after(record.schedule, tx.now)
                if not record.state_reason or record.state_reason.startswith(MISSED):
                    changes["state_reason"] = f"{MISSED} ({record.schedule.next_at}): {failure}"
            elif not failure and record.state_reason.startswith(MISSED):
                changes["state_reason"] = ""
            return sandboxes.change(tx, sandbox, **changes) if changes else None

        after = await self._world.write(write)
        if after is not None:
            self._world.bus.publish(Happening.UPDATED, after)
