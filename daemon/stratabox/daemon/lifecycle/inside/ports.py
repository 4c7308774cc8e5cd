"""Forwarded ports: adding, listing and removing them, and keeping them as their rows say.

```
 AddPort ─▶ listens ─▶ row ─▶ leads connections ─▶ RemovePort, or the sandbox is over
                        │             ▲                     │
                        └── new start of the daemon         └─▶ row, then what listens
```

A port at the host listens for as long as there is its row. One in the guest listens while the guest
is ready (`guest_side`). Rows are of one sandbox: copies have none of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from stratabox.daemon.lifecycle.common.locks import Locks
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.inside import endpoints
from stratabox.daemon.lifecycle.inside.carrying import Far, reach
from stratabox.daemon.lifecycle.inside.guest_side import GuestSide
from stratabox.daemon.lifecycle.inside.listening import Listening
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import ports, sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import (
    ConflictError,
    DeniedError,
    NoSpaceError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.ids import PortId, SandboxId, mint
from stratabox.storage.model.ports import Direction, Endpoint, Port
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import SandboxState

log = logging.getLogger(__name__)

MOST = 64
"""Ports of one sandbox."""


@dataclass(frozen=True, kw_only=True)
class NewPort:
    """What is asked for."""

    direction: Direction
    host: Endpoint
    guest: Endpoint
    mode: int = 0
    """Of the Unix socket that listens; 0: ours to choose."""


@dataclass(frozen=True, kw_only=True)
class PortStatus:
    """A port, and what it does now."""

    port: Port
    listening: bool
    problem: str
    connections: int


@dataclass(frozen=True)
class _AtHost:
    """A port of the host, and what listens for it, or why nothing does."""

    port: Port
    listening: Listening | None
    problem: str = ""


class Ports:
    """The use cases of ports."""

    def __init__(self, world: World, guests: Guests) -> None:
        self._world = world
        self._guests = guests
        self._rules = endpoints.rules_of(world.config)
        self._locks = Locks()
        """Of sandboxes; held by whoever changes which ports one has."""
        self._at_host: dict[PortId, _AtHost] = {}
        self._in_guest: dict[SandboxId, GuestSide] = {}
        world.when_over.append(self.close)

    async def add(self, reference: str, wanted: NewPort) -> PortStatus:
        """Forward a port. Goes on to its end when the caller goes.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise InvalidArgumentError: for endpoints that cannot be.
        :raise DeniedError: AMBIGUOUS_NAME, INVALID_STATE, PORT_NOT_ALLOWED.
        :raise AlreadyExistsError: PORT_IN_USE.
        :raise NoSpaceError: TOO_MANY_PORTS.
        :raise FailedError: LISTEN_FAILED.
        :raise UnavailableError: when the guest has to listen, and cannot be reached.
        """
        to_guest = wanted.direction is Direction.TO_GUEST
        host = endpoints.checked(wanted.host, listens=to_guest, what="host")
        guest = endpoints.checked(wanted.guest, listens=False, what="guest")
        await in_thread(endpoints.require_allowed, host, self._rules, listens=to_guest)
        record = (await self._guests.find(reference))[1]
        port = Port(
            id=PortId(mint()),
            sandbox=record.id,
            direction=wanted.direction,
            host=host,
            guest=guest,
            mode=endpoints.mode_from(wanted.mode),
            created_at=datetime.now(UTC),
        )
        work = self._add_to_guest(port) if to_guest else self._add_to_host(port)
        return await self._world.tasks.see_through(work)

    async def list(self, reference: str = "") -> list[PortStatus]:
        """The ports of one sandbox, or of all, oldest first.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise DeniedError: AMBIGUOUS_NAME.
        """

        def look(tx: Transaction) -> list[Port]:
            if not reference:
                return ports.everything(tx)
            return ports.of_sandbox(tx, sandboxes.resolve(tx, reference))

        return [self._status(port) for port in await self._world.read(look)]

    async def remove(self, port: str) -> None:
        """Stop forwarding; the connections are closed when this returns.

        :raise NotFoundError: PORT_NOT_FOUND.
        """
        await self._world.tasks.see_through(self._remove(port))

    async def close(self, sandbox: SandboxId) -> None:
        """Let go of all ports of a sandbox that is over. Their rows are gone already."""
        async with self._locks.hold(sandbox):
            for each in [one for one in self._at_host.values() if one.port.sandbox == sandbox]:
                await self._let_go(each)
            if side := self._in_guest.pop(sandbox, None):
                await side.close()

    async def recover(self) -> None:
        """Listen for the ports of an earlier daemon. Nothing is raised: a port says what fails."""
        for port in await self._world.read(ports.everything):
            if port.direction is Direction.TO_GUEST:
                await self._open(port)
            else:
                self._side(port.sandbox).take(port)

    async def keep(self) -> None:
        """See to it that what can listen does, whenever a guest has become ready."""
        while True:
            try:
                with self._world.bus.subscribe() as subscription:
                    for side in self._in_guest.values():
                        side.poke()
                    async for event in subscription.events():
                        if isinstance(event.record, Sandbox):
                            await self._changed(event.record)
            except ConflictError as error:  # too much has happened: look at all again
                log.info("ports look at all sandboxes: %s", error.message)
            except UnavailableError:
                return  # the daemon ends

    async def close_all(self) -> None:
        """Let go of all that listens, for the daemon's own end. Rows stay."""
        for sandbox in {each.port.sandbox for each in self._at_host.values()} | set(self._in_guest):
            await self.close(sandbox)

    async def _add_to_guest(self, port: Port) -> PortStatus:
        async with self._locks.hold(port.sandbox):
            listening = Listening.open(port.host, port.mode)
            try:
                port = replace(port, host=listening.endpoint)
                await self._world.write(lambda tx: _insert(tx, port))
            except BaseException:
                await listening.close()
                raise
            self._serve(port, listening)
            return self._status(port)

    async def _add_to_host(self, port: Port) -> PortStatus:
        async with self._locks.hold(port.sandbox):
            # The row first: what a killed daemon leaves in a guest must be known to the next one.
            await self._world.write(lambda tx: _insert(tx, port))
            try:
                await self._side(port.sandbox).add(port)
            except BaseException:
                await self._world.write(lambda tx: ports.delete(tx, port.id))
                raise
            return self._status(port)

    async def _remove(self, reference: str) -> None:
        port = await self._world.read(lambda tx: ports.get(tx, reference))

        def write(tx: Transaction) -> None:
            ports.get(tx, port.id)  # of two removals at once, one must be told that it is gone
            ports.delete(tx, port.id)

        async with self._locks.hold(port.sandbox):
            await self._world.write(write)
            if kept := self._at_host.get(port.id):
                await self._let_go(kept)
            side = self._in_guest.get(port.sandbox)
            if side is not None:
                await side.remove(port.id)
                if side.is_empty:
                    await self._in_guest.pop(port.sandbox).close()

    async def _let_go(self, kept: _AtHost) -> None:
        del self._at_host[kept.port.id]
        if kept.listening is not None:
            await kept.listening.close()

    async def _open(self, port: Port) -> None:
        try:
            await in_thread(endpoints.require_allowed, port.host, self._rules, listens=True)
            listening = Listening.open(port.host, port.mode)
        except StrataboxError as error:
            log.warning("port %s does not listen: %s", port.id, error.message)
            self._at_host[port.id] = _AtHost(port, None, error.message)
        else:
            self._serve(port, listening)

    def _serve(self, port: Port, listening: Listening) -> None:
        async def connect() -> Far:
            guest = self._guests.of(port.sandbox)
            record = await guest.record()
            if record.state is not SandboxState.RUNNING:
                raise DeniedError(f"sandbox {record.name!r} is {record.state}")
            return await reach(await guest.connection(), port.guest)

        listening.serve(connect, port.id)
        self._at_host[port.id] = _AtHost(port, listening)

    def _side(self, sandbox: SandboxId) -> GuestSide:
        side = self._in_guest.get(sandbox)
        if side is None:
            guest = self._guests.of(sandbox)
            side = self._in_guest[sandbox] = GuestSide(
                sandbox, guest.connection, lambda: guest.domain is not None and guest.is_ready
            )
        return side

    async def _changed(self, record: Sandbox) -> None:
        if record.state is not SandboxState.RUNNING or not record.ready:
            return
        if side := self._in_guest.get(record.id):
            side.poke()
        # What was taken at the host may be free now.
        for kept in [each for each in self._at_host.values() if each.port.sandbox == record.id]:
            if kept.listening is None:
                async with self._locks.hold(record.id):
                    if self._at_host.get(kept.port.id) is kept:
                        await self._open(kept.port)

    def _status(self, port: Port) -> PortStatus:
        if port.direction is Direction.TO_GUEST:
            kept = self._at_host.get(port.id)
            listening = kept.listening if kept else None
            return PortStatus(
                port=port,
                listening=listening is not None,
                problem=kept.problem if kept else "",
                connections=len(listening.crowd) if listening else 0,
            )
        side = self._in_guest.get(port.sandbox)
        inside = side.listens(port.id) if side else None
        return PortStatus(
            port=port,
            listening=inside is not None,
            problem=side.problem(port.id) if side else "",
            connections=len(inside.crowd) if inside else 0,
        )


def _insert(tx: Transaction, port: Port) -> None:
    record = sandboxes.get(tx, port.sandbox)
    if record.state.is_over:
        raise DeniedError(
            f"sandbox {record.name!r} is {record.state}: it can have no ports", sandbox=record.id
        )
    if len(ports.of_sandbox(tx, port.sandbox)) >= MOST:
        raise NoSpaceError(
            f"sandbox {record.name!r} has {MOST} ports: remove some first",
            reason="TOO_MANY_PORTS",
            limit=MOST,
        )
    ports.insert(tx, port)
