"""Warm spares: domains that wait, loaded with a snapshot's memory, for somebody to restore it.

```
            keeper (`sparing`)              a restore            drop, close, or its QEMU's end
 (nothing) ───────────────────▶ waiting ───────────────▶ taken
                                   └────────────────────────────▶ (nothing)
```

A spare is a sandbox made ahead as far as it goes without a record: its id, uid and generation id
are chosen, its overlays lie in its own folder, its QEMU has the saved state and stands still. A
restore writes the very same records as ever, with the spare's ids, moves the overlays to their
place, and lets it run. What a killed daemon leaves of a spare is a domain that no sandbox has and a
folder that no sandbox has: `reconcile` ends and removes both.

Which snapshots: those of the last restores, one spare for each of them, so that one that is
restored often has several. A spare is made for one policy of identity: with RENEW its network card
has an address of its own from the start.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Sequence, Set
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.events import Event, Exited, OnEvent
from stratabox.daemon.lifecycle.chains.opening import Opening
from stratabox.daemon.lifecycle.common.threads import settle
from stratabox.storage.model.errors import StrataboxError
from stratabox.storage.model.ids import LayerId, SandboxId, SnapshotId
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import Identity

log = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0
"""A spare that does not answer by then is given up; it takes less than a millisecond."""


class Relay:
    """Hands a domain's events to whoever has the domain now."""

    def __init__(self, to: OnEvent) -> None:
        self.to = to

    def __call__(self, event: Event) -> None:
        """Hand one on."""
        self.to(event)


@dataclass(frozen=True)
class Want:
    """What a restore asked for, and the next one may."""

    snapshot: SnapshotId
    identity: Identity


@dataclass(frozen=True, kw_only=True)
class Spare:
    """One domain that waits."""

    want: Want
    draft: Sandbox
    """What the sandbox is that it becomes: its ids, uid, disks and card's address."""
    folder: Path
    """Where its overlays lie."""
    domain: Domain
    relay: Relay
    layers: frozenset[LayerId]
    """What its disks stand on."""
    hold: AsyncExitStack
    """Keeps its saved memory ready: what its QEMU maps anyway is of use to others too."""
    undo: AsyncExitStack
    """Ends it, and removes what it left; lets go of `hold` too."""

    async def end(self) -> None:
        """Nothing is left of it. Idempotent."""
        await settle(self.undo.aclose())


class Spares:
    """The spares that wait, and for which snapshots some should. Passive: see `sparing`.

    :param most: how many may wait; 0: none.
    """

    def __init__(self, most: int, opening: Opening | None = None) -> None:
        self.most = most
        self._opening = opening or Opening()
        self.uids: dict[SandboxId, int] = {}
        """Host uids of theirs, and of those being made."""
        self.drafts: set[SandboxId] = set()
        """Ids of those that are there or being made; the domain of each is nobody's sandbox."""
        self.making: tuple[Want, asyncio.Task[None]] | None = None
        self.changed = asyncio.Event()
        """There may be something to do for the keeper."""
        # More than are served at once: of a snapshot that is deleted others take the place.
        self._recent: deque[Want] = deque(maxlen=4 * most)
        self._waiting: list[Spare] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def reserved_uids(self) -> set[int]:
        """Host uids that no other sandbox may get. From any thread."""
        return set(self.uids.copy().values())

    def note(self, want: Want) -> None:
        """Such a restore has just been done."""
        self._recent.append(want)
        self.changed.set()

    async def take(self, want: Want) -> Spare | None:
        """One that waits for just that and answers; it is the caller's to end or to put back."""
        while True:
            found = next((spare for spare in self._waiting if spare.want == want), None)
            if found is None:
                return None
            self._waiting.remove(found)
            # What it stands on must not be replaced before it is some sandbox's.
            self._opening.begin(found.draft.id)
            found.undo.callback(self._opening.end, found.draft.id)
            try:
                answers = await _answers(found.domain)
            except BaseException:
                self.put(found)
                raise
            if answers:
                return found
            await self._end([found])

    async def hand_over(self, spare: Spare, on_event: OnEvent) -> Domain:
        """The domain of one that was taken; it, and all that it stands on, is the caller's now.

        To be called once the spare's ids and uid are in the catalog.
        """
        await settle(spare.hold.aclose())
        # No await from here on: a cancellation must find it either the spare's or the caller's.
        spare.undo.pop_all()
        spare.relay.to = on_event
        self.uids.pop(spare.draft.id, None)
        self.drafts.discard(spare.draft.id)
        self._opening.end(spare.draft.id)
        return spare.domain

    def put(self, spare: Spare) -> None:
        """One more waits; also one that was taken and not needed."""
        self._opening.end(spare.draft.id)
        self._waiting.append(spare)
        self.changed.set()

    def missing(self) -> Want | None:
        """What there should be one more for, of what was restored last."""
        last = self._last()
        lacking = Counter(last)
        lacking.subtract(spare.want for spare in self._waiting)
        return next((each for each in last if lacking[each] > 0), None)

    def give_up(self, snapshot: SnapshotId) -> None:
        """Want none of that snapshot until it is restored again."""
        kept = [each for each in self._recent if each.snapshot != snapshot]
        self._recent.clear()
        self._recent.extend(kept)

    async def end_surplus(self) -> None:
        """End those that died, and those that nobody is expected to ask for any more."""
        wanted = Counter(self._last())
        keep: list[Spare] = []
        for spare in reversed(self._waiting):
            if wanted[spare.want] > 0 and not spare.domain.exited.done():
                wanted[spare.want] -= 1
                keep.append(spare)
        await self._end([spare for spare in self._waiting if spare not in keep])

    async def drop(self, snapshot: SnapshotId) -> None:
        """The snapshot is deleted: nothing of it is held by a spare when this returns."""
        self.give_up(snapshot)
        if self.making is not None and self.making[0].snapshot == snapshot:
            self.making[1].cancel()
            await asyncio.wait((self.making[1],))
        await self._end([spare for spare in self._waiting if spare.want.snapshot == snapshot])

    def withdraw(self, layers: Set[LayerId]) -> list[Spare]:
        """Those that stand on some of these layers, which are about to be replaced; `end` them.

        From now on none of them is taken. One that is being made is given up, and made anew.
        """
        if self.making is not None:
            self.making[1].cancel()
        stale = [spare for spare in self._waiting if spare.layers & layers]
        self._waiting = [spare for spare in self._waiting if spare not in stale]
        self.changed.set()
        return stale

    async def end(self, spares: Sequence[Spare]) -> None:
        """Nothing is left of these when this returns."""
        await self._end(spares)

    async def end_all(self) -> None:
        """None waits when this returns."""
        await self._end(list(self._waiting))

    def hear(self, event: Event) -> None:
        """What the QEMU of one that waits tells by itself."""
        if isinstance(event, Exited):
            log.warning("a spare has ended: %s", event.reason)
            self.changed.set()

    def _last(self) -> list[Want]:
        """What should have a spare each, the most urgent first."""
        return list(self._recent)[::-1][: self.most]

    async def _end(self, spares: Sequence[Spare]) -> None:
        self._waiting = [spare for spare in self._waiting if spare not in spares]
        endings = [spare.end() for spare in spares]
        for error in await asyncio.gather(*endings, return_exceptions=True):
            if isinstance(error, StrataboxError | OSError):
                # The next daemon's reconcile ends what the kernel does not let go of now.
                log.error("a spare could not be ended: %s", error)
            elif error is not None:
                raise error


async def _answers(domain: Domain) -> bool:
    """Whether it can be let run. A process that was killed may take a while to be gone."""
    asking = asyncio.ensure_future(domain.status())
    try:
        either: set[asyncio.Future[Any]] = {asking, domain.exited}
        await asyncio.wait(either, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    finally:
        asking.cancel()
        await asyncio.wait({asking})
    return not asking.cancelled() and asking.exception() is None
