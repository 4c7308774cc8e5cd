"""Checking the store: everything is read and compared while guests and use cases go on.

One file after the other, in a thread that yields to everything else; then one guest after the
other. What changes meanwhile is looked at again as it is then, and what is gone is no finding.
Whoever asked can go at any time; that ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.threads import be_nice, in_executor
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.upkeep.domains import check_domains
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import losses
from stratabox.storage.files import mending, quarantine
from stratabox.storage.files.checking import (
    Finding,
    Read,
    Wrong,
    examine,
    finding,
    stray_finding,
    strays,
)
from stratabox.storage.files.quarantine import Held
from stratabox.storage.files.stock import Item, Kind, Stock, take_stock
from stratabox.storage.model.ids import LayerId


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a check has found, and how much it has read."""

    findings: Sequence[Finding]
    files: int
    bytes: int
    held: Held
    """What is in the quarantine now."""


async def check_store(
    world: World, guests: Guests, *, repair: bool = False, deep: bool = False
) -> Checked:
    """Compare all that is kept, and all that runs, with what the catalog says.

    :param repair: do what is safe about what is found; otherwise nothing is changed.
    :param deep: read sealed layers whole, too.
    :raise StrataboxError: when the catalog cannot be read. What is wrong with files is a finding.
    """
    read = Read(deep=deep)
    with ThreadPoolExecutor(1, "check", initializer=be_nice) as thread:
        wrong, nobodys, stock = await _look_at_files(world, thread, read)
        if repair:
            findings = await _mend_files(world, thread, wrong, nobodys, stock)
        else:
            findings = [finding(item, wrong[item], stock) for item in wrong]
            findings += [stray_finding(name) for name in sorted(nobodys)]
        held = await in_executor(thread, lambda: quarantine.held(world.store.layout))
    findings += await check_domains(world, guests, repair=repair)
    return Checked(findings=findings, files=read.files, bytes=read.bytes, held=held)


async def _look_at_files(
    world: World, thread: ThreadPoolExecutor, read: Read
) -> tuple[dict[Item, Wrong], set[str], Stock]:
    """What is wrong with which file, which files are nobody's, and what there must be."""
    layout = world.store.layout
    task = asyncio.current_task()
    assert task is not None

    async def stocktaking() -> Stock:
        return await world.read(lambda tx: take_stock(tx, layout))

    async def look(item: Item) -> Wrong | None:
        return await in_executor(
            thread, lambda: examine(item, stock, layout, read, lambda: not task.cancelling())
        )

    async def nobodys() -> set[str]:
        return await in_executor(thread, lambda: strays(stock, layout))

    stock = await stocktaking()
    names = await nobodys()
    wrong: dict[Item, Wrong] = {}
    due = sorted(stock.items, key=lambda item: (item.kind, item.id))
    while due:
        for item in due:
            found = await look(item)
            if found is not None:
                wrong[item] = found
        # Only what is still listed as it was when it was looked at is wrong; and what is listed
        # otherwise now, as after a merge, is looked at as it is now.
        again = {(item.kind, item.id) for item in wrong}
        before, stock = stock, await stocktaking()
        wrong = {item: found for item, found in wrong.items() if item in stock.items}
        due = [
            item
            for item in stock.items - before.items
            if (item.kind, item.id) in again and item not in wrong
        ]
    return wrong, names & await nobodys(), stock


async def _mend_files(
    world: World,
    thread: ThreadPoolExecutor,
    wrong: Mapping[Item, Wrong],
    nobodys: Collection[str],
    stock: Stock,
) -> list[Finding]:
    """Do what is safe, and note in the records what is lost; the findings, with what was done."""
    layout = world.store.layout
    findings = []
    for item, what in wrong.items():
        found = finding(item, what, stock)
        try:
            done = await in_executor(thread, partial(mending.mend, item, what, layout))
            findings.append(replace(found, repaired=done))
        except OSError as error:
            message = f"{found.message}; no repair: {error.strerror or error}"
            findings.append(replace(found, message=message))
    # In the catalog's thread, as the rows of what is made are written there.
    moved = await in_executor(world.worker, lambda: mending.put_aside(nobodys, layout))
    findings += [
        replace(stray_finding(name), repaired=moved.get(name, "")) for name in sorted(nobodys)
    ]
    gone = [item for item in wrong if wrong[item].is_gone]
    missing = {LayerId(item.id) for item in gone if item.kind is Kind.LAYER}
    rams = {item.id for item in gone if item.kind in (Kind.RAM, Kind.STATE)}
    for record in await world.write(lambda tx: losses.note(tx, missing, rams)):
        world.bus.publish(Happening.UPDATED, record)
    return findings
