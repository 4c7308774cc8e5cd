"""Which spares wait for whom: what was restored last, and nothing twice."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from stratabox.daemon.lifecycle.memory.spares import Relay, Spare, Spares, Want
from stratabox.storage.model.ids import SandboxId, SnapshotId
from stratabox.storage.model.states import Identity
from support.records import Maker as Records

records = Records()
A, B, C = (Want(SnapshotId(name), Identity.RENEW) for name in "abc")
KEPT = Want(A.snapshot, Identity.KEEP)


@dataclass
class FakeDomain:
    """All that the spares themselves look at."""

    exited: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    answers: bool = True

    async def status(self) -> str:
        if not self.answers:  # its connection is lost, and does not come back
            await asyncio.Event().wait()
        return "prelaunch"


class Maker:
    """Makes spares that note their end."""

    def __init__(self) -> None:
        self.ended: list[Spare] = []
        self._number = 0

    def __call__(self, want: Want) -> Spare:
        self._number += 1
        undo = AsyncExitStack()
        spare = Spare(
            want=want,
            draft=records.sandbox(id=SandboxId(str(self._number)), uid=self._number),
            folder=Path("/nowhere"),
            layers=frozenset(),
            domain=cast("Any", FakeDomain()),
            relay=Relay(lambda _: None),
            hold=AsyncExitStack(),
            undo=undo,
        )
        undo.callback(lambda: self.ended.append(spare))
        return spare


async def test_each_restore_is_worth_one() -> None:
    spares, make = Spares(3), Maker()
    assert spares.missing() is None
    for want in (A, B, A):
        spares.note(want)
    for expected in (A, B, A):
        assert spares.missing() in (A, B)
        spares.put(make(expected))
    assert spares.missing() is None
    # One more of another, and it takes the place of the oldest.
    spares.note(C)
    assert spares.missing() == C
    await spares.end_surplus()
    assert [spare.want for spare in make.ended] == [A]
    assert len(spares) == 2


async def test_taken_is_what_fits_and_answers() -> None:
    spares, make = Spares(2), Maker()
    dead, alive = make(A), make(A)
    spares.put(dead)
    spares.put(alive)
    fake = cast("FakeDomain", dead.domain)
    fake.answers = False
    assert await spares.take(KEPT) is None
    assert await spares.take(B) is None
    # Its process is killed: nobody has noticed yet when it is asked for.
    asyncio.get_running_loop().call_soon(lambda: fake.exited.set_result(None))
    assert await spares.take(A) is alive
    assert make.ended == [dead]
    assert await spares.take(A) is None


async def test_who_gives_up_while_it_is_asked_leaves_it() -> None:
    spares, make = Spares(1), Maker()
    spare = make(A)
    spares.put(spare)
    cast("FakeDomain", spare.domain).answers = False
    taking = asyncio.create_task(spares.take(A))
    await asyncio.sleep(0)
    assert len(spares) == 0
    taking.cancel()
    await asyncio.wait({taking})
    assert len(spares) == 1
    assert make.ended == []


async def test_one_that_was_handed_over_is_not_ended() -> None:
    spares, make = Spares(1), Maker()
    spare = make(A)
    spares.uids[spare.draft.id] = 5
    assert spares.reserved_uids() == {5}
    heard: list[object] = []
    await spares.hand_over(spare, heard.append)
    await spare.end()
    assert make.ended == []
    assert spares.reserved_uids() == set()
    spare.relay(cast("Any", "event"))
    assert heard == ["event"]


async def test_a_deleted_snapshot_leaves_none_and_is_not_wanted() -> None:
    spares, make = Spares(2), Maker()
    for want in (B, A, A, KEPT):
        spares.note(want)
    waiting, other = make(A), make(B)
    spares.put(waiting)
    spares.put(other)

    async def make_for_ever() -> None:
        await asyncio.Event().wait()

    task = asyncio.create_task(make_for_ever())
    spares.making = (KEPT, task)
    await spares.drop(A.snapshot)
    assert task.cancelled()
    assert make.ended == [waiting]
    assert spares.missing() is None  # B was restored before, and has one
    await spares.end_all()
    assert make.ended == [waiting, other]


async def test_without_the_setting_nothing_is_wanted() -> None:
    spares = Spares(0)
    spares.note(A)
    assert spares.missing() is None
