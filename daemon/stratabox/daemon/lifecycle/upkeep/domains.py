"""Compares running QEMUs with the catalog: who runs, what they write, and whether they should.

Each sandbox is looked at with its lock held, so that no operation of ours is under way on it; what
is found then is looked at a second time, since word of what QEMU did by itself may just be waiting
for that very lock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.machine import ChainLayer, DomainHandle
from stratabox.daemon.lifecycle.running import reasons
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.running.thawing import thaw
from stratabox.daemon.lifecycle.volumes.checking import differences
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import layers, sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.files.checking import Finding
from stratabox.storage.model.errors import NotFoundError, StrataboxError, UnavailableError
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import SandboxState

FREEZE_STATUS_SECONDS = 5.0
"""How long a guest's agent may take to say whether file systems are frozen."""

Cure = Callable[[], Awaitable[str]]
"""Mends it; returns what was done."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    finding: Finding
    cure: Cure | None = None


async def check_domains(world: World, guests: Guests, *, repair: bool) -> list[Finding]:
    """Look at all guests.

    :param repair: do what is safe about what is found.
    """
    findings: list[Finding] = []
    for record in await world.read(sandboxes.everything):
        if record.has_process and await _look(world, guests.of(record.id)):
            async with guests.of(record.id).lock:
                findings += [
                    await _mended(each, repair=repair)
                    for each in await _look_locked(world, guests.of(record.id))
                ]
    before = {handle.pid for handle in await _orphans(world)}
    for handle in await _orphans(world):
        if handle.pid in before:
            findings.append(await _mended(_orphan(world, handle), repair=repair))
    return findings


async def _mended(found: _Found, *, repair: bool) -> Finding:
    if not repair or found.cure is None:
        return found.finding
    try:
        return replace(found.finding, repaired=await found.cure())
    except (StrataboxError, OSError) as error:
        return replace(found.finding, message=f"{found.finding.message}; no repair: {error}")


async def _look(world: World, guest: Guest) -> list[_Found]:
    async with guest.lock:
        return await _look_locked(world, guest)


async def _look_locked(world: World, guest: Guest) -> list[_Found]:
    try:
        record = await guest.record()
    except NotFoundError:
        return []
    if not record.has_process:
        return []
    domain = guest.domain
    if domain is None:
        return [_lost_process(world, record)]
    try:
        found = list(await _status(world, guest, record, domain))
        found += await _disks(world, record, domain)
        strange = await differences(world, record, domain)
        found += [_found("GRAPH_MISMATCH", record, what, _RESTART) for what in strange]
    except UnavailableError as error:
        if domain.exited.done():
            return []  # which is being written down
        what = f"its QEMU does not answer: {error.message}"
        return [_found("MONITOR_UNAVAILABLE", record, what, _RESTART)]
    found += await _freeze(guest, record)
    return found


_RESTART = "end the daemon and start it again: it takes over what runs, and says what cannot be"
_REPAIR = "'stratabox check --repair'"


def _found(reason: str, record: Sandbox, what: str, how: str, cure: Cure | None = None) -> _Found:
    message = f"sandbox {record.name!r}: {what}"
    finding = Finding(reason=reason, kind="sandbox", subject=record.id, message=message, cure=how)
    return _Found(finding=finding, cure=cure)


def _lost_process(world: World, record: Sandbox) -> _Found:
    async def write() -> str:
        reason = "its QEMU was gone, and nobody had noticed"
        await world.change_sandbox(
            record.id, state=SandboxState.FAILED, state_reason=reason, ready=False
        )
        return "its record is FAILED now: start it again"

    return _found(
        "PROCESS_LOST", record, f"it is {record.state}, but no QEMU of it is known",
        f"{_REPAIR} writes that down; then start it again", write,
    )  # fmt: skip


async def _status(world: World, guest: Guest, record: Sandbox, domain: Domain) -> Iterable[_Found]:
    """The record's word against QEMU's, and what it says of a disk."""
    status = await domain.status()
    if failed := reasons.failed_disk(record.state_reason):
        how = (
            "look at the host's kernel log; stop and start the sandbox once its disk is good again"
        )
        return [_found("DISK_FAILED", record, failed, how)]

    async def go_on() -> str:
        await domain.cont()
        return "it runs on"

    async def write(**changes: object) -> str:
        await world.change_sandbox(record.id, **changes)
        return "its record says so now"

    if record.state is SandboxState.RUNNING and status in ("paused", "prelaunch"):
        return [_found(
            "GUEST_STOPPED", record, f"it is running by its record, but QEMU's word is {status}",
            f"{_REPAIR} lets it run", go_on,
        )]  # fmt: skip
    if record.state is SandboxState.RUNNING and status == "io-error":
        return [_found(
            "GUEST_STOPPED", record, "QEMU has stopped it because a disk of the host was full",
            f"{_REPAIR} writes that down; free some space, then resume it",
            lambda: write(state=SandboxState.PAUSED, state_reason=reasons.PAUSED_FULL),
        )]  # fmt: skip
    if record.state is SandboxState.PAUSED and status == "running":
        return [_found(
            "GUEST_RUNS", record, "it is paused by its record, but it runs",
            f"{_REPAIR} writes that down",
            lambda: write(state=SandboxState.RUNNING, state_reason=""),
        )]  # fmt: skip
    if record.state is SandboxState.PAUSED and not record.state_reason:
        return [_found(
            "PAUSED_WITHOUT_REASON", record, "it is paused, and its record does not say why",
            f"{_REPAIR} writes that; resume it",
            lambda: write(state_reason=reasons.PAUSED_BY_USER),
        )]  # fmt: skip
    return []


async def _disks(world: World, record: Sandbox, domain: Domain) -> list[_Found]:
    """QEMU's block graph against the chains of the catalog."""
    layout = world.store.layout

    def chains(tx: Transaction) -> dict[int, list[ChainLayer]]:
        return {
            disk.index: [
                ChainLayer(id=layer.id, path=layout.layer(layer.id))
                for layer in layers.chain(tx, disk.layer)
            ]
            for disk in record.disks
        }

    expected = await world.read(chains)
    active, nodes = await domain.disks.active_layers(), await domain.disks.nodes()
    found = []
    for index, chain in expected.items():
        wrong = [
            f"it writes {active.get(index)} on disk {index}, not {chain[0].node}"
            for _ in (1,) if active.get(index) != chain[0].node
        ]  # fmt: skip
        wrong += [
            f"it could write layer {layer.id} of disk {index}, which is sealed"
            for layer in chain[1:] if nodes.get(layer.node) is False
        ]  # fmt: skip
        found += [_found("GRAPH_MISMATCH", record, what, _RESTART) for what in wrong]
    return found


async def _freeze(guest: Guest, record: Sandbox) -> list[_Found]:
    if record.state is not SandboxState.RUNNING or not guest.is_ready:
        return []
    try:
        status = await guest.require_agent().fsfreeze_status(FREEZE_STATUS_SECONDS)
    except StrataboxError:
        return []  # it is busy, or restarts: its readiness is told elsewhere
    if status == "thawed":
        return []

    async def mend() -> str:
        count = await thaw(guest.require_agent())
        return f"{count if count is not None else 'its'} file systems were thawed"

    return [_found(
        "GUEST_FROZEN", record, "its file systems are frozen, by nobody who is at it now",
        f"{_REPAIR} thaws them", mend,
    )]  # fmt: skip


async def _orphans(world: World) -> list[DomainHandle]:
    """Domains of this store that no sandbox has, and no warm spare is."""
    handles = await world.launcher.list()
    known: set[SandboxId] = {record.id for record in await world.read(sandboxes.everything)}
    return [
        handle
        for handle in handles
        if handle.sandbox not in known and handle.sandbox not in world.spares.drafts
    ]


def _orphan(world: World, handle: DomainHandle) -> _Found:
    async def end() -> str:
        await world.launcher.stop(handle)
        return "it was ended"

    finding = Finding(
        reason="ORPHANED_DOMAIN",
        kind="process",
        subject=str(handle.pid),
        message=f"QEMU {handle.pid} runs for sandbox {handle.sandbox}, of which there is no record",
        cure=f"{_REPAIR} ends it, as the daemon does when it starts",
    )
    return _Found(finding=finding, cure=end)
