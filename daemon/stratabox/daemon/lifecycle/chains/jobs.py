"""Jobs: layers that are written anew in the background, and what can be done with them.

```
            `next_job`            all written and compared        running guests
 QUEUED ───────────────▶ RUNNING ─────────────────────────▶ (replaced) ────────▶ DONE
    ▲  └── pause ──▶ PAUSED ◀┘ │
    └───── resume ─────┘       └▶ FAILED       from anywhere before (replaced): CANCELLED
```

One at a time, in a thread that yields to everything else, begun in a quiet moment after a snapshot
or a sweep; what somebody asks for begins at once. No snapshot, restore or guest waits for one: old
layers are as good as new ones until the catalog says otherwise, and for who has them open
afterwards, too. A daemon that comes back begins anew what was not replaced yet, and lets the guests
of what was go over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from stratabox.daemon.lifecycle.chains.rate import Rate
from stratabox.daemon.lifecycle.chains.takeover import Takeover
from stratabox.daemon.lifecycle.chains.writing import Writing
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.threads import be_nice, in_executor, in_thread, settle
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.upkeep import backups
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import chains, jobs, layers
from stratabox.storage.catalog.chains import Next, Replaced
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.files.durable import host_error
from stratabox.storage.model.errors import DeniedError, NoSpaceError, StrataboxError
from stratabox.storage.model.ids import JobId, LayerId
from stratabox.storage.model.records import Job
from stratabox.storage.model.states import JobKind, JobState

log = logging.getLogger(__name__)

T = TypeVar("T")

QUIET = 1.0
LONGEST = 10.0
"""Seconds without another change of chains before one is begun; and with others, at most."""
LATE = 5.0
"""Seconds until a guest is tried again that was busy."""


class Jobs:
    """Does them, and answers for them."""

    def __init__(self, world: World, guests: Guests) -> None:
        self._world = world
        self._takeover = Takeover(world, guests)
        self._rate = Rate(world.config.jobs_rate)
        self._writings: dict[JobId, Writing] = {}
        """Of the one that runs, and of those that were paused."""
        self._postponed: set[JobId] = set()
        self._asked = asyncio.Event()
        self._ended: dict[JobId, asyncio.Event] = {}

    # What can be asked

    async def everything(self, *, over: bool = False) -> list[Job]:
        """All that wait, run or are paused, oldest first. :param over: the last day's, too."""
        found = await self._world.read(lambda tx: jobs.everything(tx, over=over, own=True))
        return [self._as_it_is(job) for job in found]

    async def get(self, reference: str) -> Job:
        """One job.

        :raise NotFoundError: JOB_NOT_FOUND.
        :raise DeniedError: AMBIGUOUS_NAME.
        """
        found = await self._world.read(lambda tx: jobs.get(tx, jobs.resolve(tx, reference)))
        return self._as_it_is(found)

    async def pause(self, reference: str) -> Job:
        """Hold one where it is. Paused already is fine; what is written so far is kept.

        :raise NotFoundError: JOB_NOT_FOUND.
        :raise DeniedError: INVALID_STATE, when it is over.
        """
        job = await self._world.write(
            lambda tx: _step(tx, reference, "paused", JobState.PAUSED, keeping=())
        )
        self._stop(job.id)
        return self._as_it_is(job)

    async def resume(self, reference: str) -> Job:
        """Let a paused one go on when its turn comes. One that is not paused is left alone.

        :raise NotFoundError: JOB_NOT_FOUND.
        :raise DeniedError: INVALID_STATE, when it is over.
        """
        job = await self._world.write(
            lambda tx: _step(tx, reference, "resumed", JobState.QUEUED, keeping=(JobState.RUNNING,))
        )
        self._asked.set()
        return self._as_it_is(job)

    async def cancel(self, reference: str) -> Job:
        """Give one up; what it has written is removed. Cancelled already is fine.

        :raise NotFoundError: JOB_NOT_FOUND.
        :raise DeniedError: INVALID_STATE, when it is over, or all but over.
        """

        def write(tx: Transaction) -> Job:
            job = jobs.get(tx, jobs.resolve(tx, reference))
            if job.state is JobState.CANCELLED:
                return job
            if _is_replaced(tx, job):
                raise DeniedError(
                    f"job {job.id} has replaced its layer: there is nothing left to cancel",
                    job=job.id,
                    state=job.state,
                )
            return _step(tx, reference, "cancelled", JobState.CANCELLED, reason="by request")

        job = await self._world.write(write)
        self._stop(job.id)
        self._asked.set()
        self._tell_end(job.id)
        await self._world.sweep()
        return self._as_it_is(job)

    async def wait(self, job: JobId) -> Job:
        """The job, once it is over. :raise NotFoundError: JOB_NOT_FOUND."""
        while True:
            ended = self._ended.setdefault(job, asyncio.Event())
            found = await self._world.read(lambda tx: jobs.get(tx, job))
            if found.state.is_over:
                return found
            await ended.wait()

    def ask(self) -> None:
        """A job was asked for, in the catalog: it begins at once."""
        self._asked.set()

    # Doing

    async def recover(self) -> None:
        """At start, before anything else is done: settle what a killed daemon has left."""
        layout = self._world.store.layout
        if any(job.state is JobState.RUNNING for job in await self.everything()):
            await backups.before_removal(self._world)
        # A paused one begins anew, too: how much of its file was durable nobody knows.
        for target in await self._world.write(_settle):
            await in_thread(layout.layer(target).unlink, missing_ok=True)

    async def keep(self) -> None:
        """Do what there is to do, until cancelled; then nothing half-made stays."""
        with ThreadPoolExecutor(1, "jobs", initializer=be_nice) as thread:
            try:
                await self._takeover.all()
                await self._world.sweep()
                while True:
                    self._asked.clear()
                    self._postponed.clear()
                    try:
                        await self._do_all(thread)
                    except StrataboxError as error:
                        # The catalog takes no writes, on a full disk for instance.
                        log.warning("jobs rest until something changes: %s", error.message)
                    await self._wait_for_more()
            finally:
                for writing in self._writings.values():
                    writing.close()

    async def _do_all(self, thread: ThreadPoolExecutor) -> None:
        # None runs now. One may be left whose end could not be written.
        await self._world.write(_settle)
        await self._takeover.late()
        while (job := await self._next()) is not None:
            await self._world.rush.calm()
            await self._do(thread, job)

    async def _wait_for_more(self) -> None:
        """Return at once when something is asked for, and a while after a change of chains."""
        changed = self._world.chains_changed
        await self._first(LATE if self._takeover.is_late else None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONGEST):
                while changed.is_set() and not self._asked.is_set():
                    changed.clear()
                    await self._first(QUIET)

    async def _first(self, seconds: float | None) -> None:
        """Wait for what is asked for or has changed; no longer than that."""
        waits = [
            asyncio.ensure_future(event.wait())
            for event in (self._asked, self._world.chains_changed)
        ]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    async def _next(self) -> Job | None:
        depth = self._world.config.chains_max_depth

        def look(tx: Transaction, after: int) -> Next:
            jobs.prune(tx)
            return chains.next_job(tx, depth, self._postponed, after)

        after: int | None = 0
        found = Next(job=None)
        while after is not None and found.job is None:
            found = await self._world.write(partial(look, after=after))
            after = found.after
        await self._drop_cancelled()
        return found.job

    async def _drop_cancelled(self) -> None:
        """Let go of what was paused, or waited, and is not to go on."""
        alive = {job.id for job in await self._world.read(jobs.everything)}
        for job in self._writings.keys() - alive:
            writing = self._writings.pop(job)
            await in_thread(writing.close)
        for job in self._ended.keys() - alive:
            self._tell_end(job)

    async def _do(self, thread: ThreadPoolExecutor, job: Job) -> None:
        """One job, as far as it goes: to its end, or to where it is paused or given up."""
        log.info("job %s (%s of layer %s) goes on", job.id, job.kind, job.layer)
        try:
            writing = await self._writing_of(thread, job)
            # It may have been stopped before there was anything to stop.
            now = await self._world.read(lambda tx: jobs.get(tx, job.id))
            if now.state is not JobState.RUNNING:
                writing.stop.set()
            if await self._in(thread, lambda: writing.run(self._rate), writing):
                await self._replace(writing)
            else:
                await self._leave(writing)
        except NoSpaceError as error:
            await self._give_up(job, error, postpone=job.kind is not JobKind.COMPACT)
        except StrataboxError as error:
            await self._give_up(job, error)
        except OSError as error:
            await self._give_up(job, host_error(error))
        finally:
            self._tell_end(job.id)
        # What it read may be nobody's any more: a sweep of meanwhile has left that alone.
        await self._world.sweep()

    async def _writing_of(self, thread: ThreadPoolExecutor, job: Job) -> Writing:
        """What it has written so far, if that is still of use, or a beginning."""
        made_of = await self._world.read(lambda tx: chains.sources(tx, job))
        writing = self._writings.get(job.id)
        if writing is not None:
            if [each.id for each in writing.made_of] == [each.id for each in made_of]:
                writing.stop.clear()
                return writing
            await in_thread(writing.close)
        writing = Writing(self._world.store.layout, job, made_of)
        self._writings[job.id] = writing
        await self._in(thread, writing.begin, writing)
        return writing

    async def _in(
        self, thread: ThreadPoolExecutor, function: Callable[[], T], writing: Writing
    ) -> T:
        """Run it there; ended soon when this is cancelled, and waited for."""
        work = asyncio.ensure_future(in_executor(thread, function))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            writing.stop.set()
            await settle(asyncio.wait({work}))
            raise

    async def _leave(self, writing: Writing) -> None:
        """It was stopped. What is paused is kept."""
        done, total = writing.done, writing.total

        def note(tx: Transaction) -> Job:
            return jobs.change(tx, writing.job.id, done_bytes=done, total_bytes=total)

        if (await self._world.write(note)).state.is_over:
            del self._writings[writing.job.id]
            await in_thread(writing.close)

    async def _replace(self, writing: Writing) -> None:
        """Put the new layer in the place of the old one, for everybody."""
        world = self._world
        job = replace(writing.job, done_bytes=writing.total, total_bytes=writing.total)

        def write() -> Replaced | None:
            writing.is_offered = True
            with world.catalog.transaction() as tx:
                jobs.change(tx, job.id, done_bytes=writing.total, total_bytes=writing.total)
                replaced = chains.replace_layer(
                    tx, job, writing.made_of, size=writing.bytes, compressed=writing.compressed
                )
            hit("jobs.replacement-written")
            writing.is_offered = replaced is not None
            return replaced

        await world.opening.free()
        # No await from here until the transaction is queued: see `opening`.
        stale = world.spares.withdraw({layer.id for layer in writing.made_of})
        try:
            replaced = await in_executor(world.worker, write)
        finally:
            await settle(world.spares.end(stale))
        if replaced is None:
            await self._not_replaced(writing)
            return
        del self._writings[job.id]
        await in_thread(writing.close)
        hit("jobs.replaced")
        for snapshot in replaced.snapshots:
            world.bus.publish(Happening.UPDATED, snapshot)
        on_it = await world.read(lambda tx: chains.sandboxes_on(tx, job.target))
        await self._takeover.of(on_it)
        hit("jobs.taken-over")
        await backups.before_removal(world)
        await world.write(lambda tx: jobs.change(tx, job.id, state=JobState.DONE))
        log.info("job %s: layer %s has replaced %s", job.id, job.target, job.layer)
        await world.sweep()

    async def _not_replaced(self, writing: Writing) -> None:
        """It was stopped in the last moment, or overtaken; in the latter case it is replanned."""

        def write(tx: Transaction) -> Job:
            job = jobs.get(tx, writing.job.id)
            if job.state is JobState.RUNNING:
                job = jobs.change(tx, job.id, state=JobState.CANCELLED, reason=chains.UNNEEDED)
                chains.hint(tx, job.layer)  # after it has ended: it does not stand in the way
            return job

        if (await self._world.write(write)).state.is_over:
            del self._writings[writing.job.id]
            await in_thread(writing.close)

    async def _give_up(self, job: Job, error: StrataboxError, *, postpone: bool = False) -> None:
        log.warning("job %s (%s of layer %s): %s", job.id, job.kind, job.layer, error.message)
        writing = self._writings.pop(job.id, None)
        if writing is not None:
            await in_thread(writing.close)
        reason = f"{error.reason}: {error.message}"
        state = JobState.QUEUED if postpone else JobState.FAILED
        if postpone:
            self._postponed.add(job.id)

        def write(tx: Transaction) -> bool:
            if _is_replaced(tx, job):
                jobs.change(tx, job.id, state=JobState.DONE)
                return True
            if jobs.get(tx, job.id).state is JobState.RUNNING:
                jobs.change(tx, job.id, state=state, reason=reason, done_bytes=0)
            return False

        is_replaced = await self._world.write(write)
        if writing is not None and not is_replaced:
            # A commit that failed cannot come back any more: another one has taken its place.
            writing.is_offered = False
            await in_thread(writing.close)

    # Inside

    def _stop(self, job: JobId) -> None:
        if job in self._writings:
            self._writings[job].stop.set()

    def _tell_end(self, job: JobId) -> None:
        """Have those look who wait for it."""
        if event := self._ended.pop(job, None):
            event.set()

    def _as_it_is(self, job: Job) -> Job:
        writing = self._writings.get(job.id)
        if writing is None or job.state.is_over:
            return job
        return replace(job, done_bytes=writing.done, total_bytes=writing.total)


def _step(
    tx: Transaction,
    reference: str,
    verb: str,
    state: JobState,
    *,
    keeping: Sequence[JobState] = (),
    reason: str = "",
) -> Job:
    """Bring a job to another state. :raise DeniedError: INVALID_STATE, when it is over."""
    job = jobs.get(tx, jobs.resolve(tx, reference))
    if job.state is state or job.state in keeping:
        return job
    if job.state.is_over:
        raise DeniedError(
            f"job {job.id} is {job.state} and cannot be {verb}", job=job.id, state=job.state
        )
    return jobs.change(tx, job.id, state=state, reason=reason)


def _settle(tx: Transaction) -> list[LayerId]:
    """Bring jobs that nobody is at to where they can go on; targets that have no row."""
    unfinished = []
    for job in jobs.in_states(tx, JobState.RUNNING, JobState.PAUSED):
        if _is_replaced(tx, job):
            jobs.change(tx, job.id, state=JobState.DONE)
            continue
        unfinished.append(job.target)
        if job.state is JobState.RUNNING:
            jobs.change(tx, job.id, state=JobState.QUEUED)
    return unfinished


def _is_replaced(tx: Transaction, job: Job) -> bool:
    return layers.exists(tx, job.target)
