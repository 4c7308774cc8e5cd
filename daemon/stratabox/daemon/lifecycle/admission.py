"""Admission: whether the host has room for one more guest.

All guests that have a process, or are about to get one, count; a start that would take them above
one of the limits is refused before anything is made. Who they are is read from the catalog, in the
very transaction that writes a new sandbox down, so that of any number of requests at once exactly
those are taken that fit, and what failed or ended has given its share back. A sandbox that exists
already and starts again is *held* room for until its record says so. `account` has the arithmetic.

Warm spares count for nothing: a guest that has not run owns no page of its RAM.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

from stratabox.daemon.hypervisor import host_room
from stratabox.daemon.hypervisor.host_room import HostRoom
from stratabox.daemon.lifecycle.account import Account, Limits, Resource, Share, Verdict
from stratabox.storage.catalog import sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import NoSpaceError
from stratabox.storage.model.ids import SandboxId


class AdmissionError(NoSpaceError):
    """No room for one more guest. ADMISSION_REFUSED.

    Metadata: `resource`, what there is too little of; `limit`, `in_use`, `wanted` and `missing` of
    it, memory and disks in MiB; and `sandboxes`, how many use it.
    """

    default_reason = "ADMISSION_REFUSED"


class Read(Protocol):
    """`World.read`, for this."""

    def __call__(self, look: Callable[[Transaction], None], /) -> Awaitable[None]:
        """Run `look` in a transaction."""


class Admission:
    """Decides who may start.

    :param room: what the host has now.
    """

    def __init__(self, limits: Limits, room: Callable[[], HostRoom] = host_room.look) -> None:
        self.limits = limits
        self._room = room
        self._processes: Callable[[], Mapping[SandboxId, int]] = dict
        # Changed in the catalog's thread when taken, in the event loop when given back.
        self._held: dict[SandboxId, Share] = {}

    def know(self, processes: Callable[[], Mapping[SandboxId, int]]) -> None:
        """Be told who has which process now; asked in the catalog's thread."""
        self._processes = processes

    def account(self, tx: Transaction, without: SandboxId | None = None) -> Account:
        """What all guests have and may yet take, and what the host has for them."""
        memory, cpus = sandboxes.memory_in_use(tx), sandboxes.cpus_in_use(tx)
        processes = self._processes()
        shares = {each: Share(memory=memory[each], cpus=cpus[each]) for each in memory}
        for each, held in list(self._held.items()):
            shares[each] = held.larger(shares.get(each))
        if without is not None:
            shares.pop(without, None)
        return Account(
            limits=self.limits,
            room=self._room(),
            shares=tuple(
                share.written(host_room.own_memory(processes[each])) if each in processes else share
                for each, share in shares.items()
            ),
        )

    def check(self, tx: Transaction, sandbox: SandboxId, memory: int, cpus: int) -> None:
        """Let a sandbox start with so many MiB, in the transaction that says that it does.

        :raise AdmissionError: ADMISSION_REFUSED.
        """
        if self.limits.unlimited:
            return
        account = self.account(tx, without=sandbox)
        if verdict := account.refuses(Share(memory=memory, cpus=cpus)):
            raise refusal(verdict)

    @asynccontextmanager
    async def room(
        self, read: Read, sandbox: SandboxId, memory: int, cpus: int
    ) -> AsyncIterator[None]:
        """Hold room for a start until its record says that it runs; within itself it is nothing.

        :param read: `World.read`.
        :raise AdmissionError: ADMISSION_REFUSED.
        """
        share, held = Share(memory=memory, cpus=cpus), self._held.get(sandbox)
        if self.limits.unlimited or (held is not None and held.larger(share) == held):
            yield
            return

        def take(tx: Transaction) -> None:
            self.check(tx, sandbox, memory, cpus)
            self._held[sandbox] = share

        try:
            await read(take)
            yield
        finally:
            self._held.pop(sandbox, None)


_WAY = "stop, terminate or pause to disk (pause --to-disk) some, or raise it"


def refusal(verdict: Verdict) -> AdmissionError:
    """The error, with the figures and what to do."""
    wanted, limit, in_use = verdict.wanted, verdict.limit, verdict.in_use
    count, missing = verdict.sandboxes, verdict.missing
    match verdict.resource:
        case Resource.MEMORY:
            if wanted > limit:
                way = "that is more than all guests may have together: take less, or raise it"
            else:
                way = f"{missing} MiB are missing: {_WAY}"
            text = (
                f"no room for a guest with {wanted} MiB of RAM: {count} sandboxes have {in_use} of"
                f" the {limit} MiB that admission.memory allows; {way}"
            )
        case Resource.HOST_MEMORY:
            text = (
                f"the host's memory is too little for this guest, which can take {wanted} MiB:"
                f" {count} sandboxes can still grow by {in_use} of the {limit} MiB that"
                " admission.memory_overcommit makes of what is available; "
                f"{missing} MiB are missing: {_WAY}, or free memory of the host"
            )
        case Resource.CPUS:
            text = (
                f"no room for a guest with {wanted} CPUs: {count} sandboxes have {in_use} of the"
                f" {limit} that admission.cpu_overcommit allows on this host; {_WAY}"
            )
        case Resource.SANDBOXES:
            text = (
                f"no room for one more guest: {in_use} sandboxes have a process, and"
                f" admission.sandboxes is {limit}; {_WAY}"
            )
        case Resource.DISK | Resource.DISK_FREE:
            key = "overcommit" if verdict.resource is Resource.DISK else "reserve"
            text = (
                f"no room for a sandbox whose disks can grow to {wanted} MiB: what there is can"
                f" grow by {in_use} MiB, and admission.disk_{key} leaves {limit} MiB of what the"
                " state folder's file system has free; delete sandboxes, snapshots or volumes, make"
                " room on it, or change the setting"
            )
    return AdmissionError(
        text,
        resource=verdict.resource,
        limit=limit,
        in_use=in_use,
        wanted=wanted,
        missing=missing,
        sandboxes=count,
    )
