"""What happened lately, of all kinds of things, for who asks afterwards or follows along.

Told is what people look for: that something is new, gone, or has another name, state, readiness or
reason. The other changes of records are for who watches those records.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from stratabox.daemon.access.ending import watch_again
from stratabox.daemon.lifecycle.common.events import Bus, Event, Happening, Record
from stratabox.storage.model.errors import ConflictError
from stratabox.storage.model.records import Image, Job, Sandbox, Snapshot
from stratabox.storage.model.workspaces import acting

REMEMBERED = 4096
"""Entries; some hundred bytes each."""
_KNOWN = 65_536
"""Things whose last state is remembered, so that only changes are told."""


class Subject(StrEnum):
    """What a thing is."""

    SANDBOX = "sandbox"
    SNAPSHOT = "snapshot"
    VOLUME = "volume"
    IMAGE = "image"
    JOB = "job"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that happened."""

    time: datetime
    subject: Subject
    id: str
    name: str
    happening: Happening
    state: str
    ready: bool
    reason: str
    request: str
    """Id of the call that has brought it about; "": nobody's, or not to be told."""
    workspace: str | None
    """Whose it is; None: everybody's."""


class Chronicle:
    """One for a daemon; of the event loop's thread."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._entries: deque[tuple[int, Entry]] = deque(maxlen=REMEMBERED)
        self._number = 0
        self._known: OrderedDict[str, tuple[object, ...]] = OrderedDict()
        self._more = asyncio.Event()
        bus.listeners.append(self._note)

    async def entries(
        self, subjects: Collection[Subject], since: datetime | None, *, follow: bool
    ) -> AsyncIterator[Entry]:
        """Those that are remembered, oldest first; then, with `follow`, those to come; all of
        the workspace that this task works in.

        :param subjects: none: all.
        :param since: None: with `follow` only those to come.
        :raise ConflictError: WATCH_BEHIND, when the reader is too slow and has missed some.
        :raise DaemonEndingError: when the daemon ends.
        """
        mine = acting.get()
        seen = self._number if follow and since is None else 0
        begun = False
        while True:
            more = self._more
            held = [each for each in self._entries if each[0] > seen]
            if begun and held and held[0][0] > seen + 1:
                raise ConflictError(
                    f"the watch fell more than {REMEMBERED} events behind: start it again",
                    reason="WATCH_BEHIND",
                )
            for number, entry in held:
                seen = number
                if since is not None and entry.time < since:
                    continue
                if None not in (mine, entry.workspace) and entry.workspace != mine:
                    continue
                if not subjects or entry.subject in subjects:
                    yield entry
            begun = True
            if not follow:
                return
            if self._number > seen:
                continue  # while they were read
            if self._bus.over.is_set():
                raise watch_again()
            await _either(more, self._bus.over)

    def _note(self, event: Event) -> None:
        record = event.record
        entry = Entry(
            time=event.time,
            subject=_subject_of(record),
            id=record.id,
            name=record.kind if isinstance(record, Job) else record.name,
            happening=event.happening,
            state="ready" if isinstance(record, Image) else str(record.state),
            ready=isinstance(record, Sandbox) and record.ready,
            reason=_reason_of(record),
            # What is everybody's may be another's doing, in words that they chose.
            request=event.request if event.workspace is not None else "",
            workspace=event.workspace,
        )
        told = (entry.name, entry.state, entry.ready, entry.reason)
        if event.happening is Happening.DELETED:
            self._known.pop(record.id, None)
        elif self._known.get(record.id) == told:
            return
        else:
            self._known[record.id] = told
            self._known.move_to_end(record.id)
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        self._number += 1
        self._entries.append((self._number, entry))
        self._more.set()
        self._more = asyncio.Event()


async def _either(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waits:
            each.cancel()


def _subject_of(record: Record) -> Subject:
    return Subject(type(record).__name__.lower())


def _reason_of(record: Record) -> str:
    match record:
        case Sandbox():
            return record.state_reason
        case Snapshot():
            return record.failure_reason
        case Image():
            return ""
    return record.reason
