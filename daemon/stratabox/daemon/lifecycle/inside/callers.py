"""What callers do through a guest's channel that leaves nothing behind: dialing, logging in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from stratabox.daemon.lifecycle.inside import dialing, endpoints, keys, tunnels
from stratabox.daemon.lifecycle.inside.carrying import Far, reach
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import ports, sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import DeniedError
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.ports import AuthorizedKey, Endpoint
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import SandboxState


@dataclass(frozen=True)
class Dialed:
    """A connection that a caller has asked for."""

    sandbox: SandboxId
    far: Far
    host_keys: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Callers:
    """The use cases of callers who connect."""

    world: World
    guests: Guests
    open: dialing.Dialing = field(default_factory=dialing.Dialing)

    @asynccontextmanager
    async def dial(self, reference: str, endpoint: Endpoint) -> AsyncIterator[Dialed]:
        """A connection to something that listens in a guest; closed with the context.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise InvalidArgumentError: for an endpoint that cannot be.
        :raise DeniedError: AMBIGUOUS_NAME, INVALID_STATE, NO_SSHD, NO_CHANNEL.
        :raise FailedError: CONNECTION_REFUSED, CHANNEL_FAILED.
        :raise NoSpaceError: TOO_MANY_CONNECTIONS.
        :raise UnavailableError: CONNECTION_LOST, CHANNEL_UNAVAILABLE, AGENT_UNAVAILABLE.
        """
        target = endpoints.checked(endpoint, listens=False, what="endpoint")
        async with AsyncExitStack() as stack:
            guest, record = await self._running(reference)
            await stack.enter_async_context(self.open.one_more())
            far = await reach(await guest.connection(), target)
            await stack.enter_async_context(far)
            yield Dialed(record.id, far)

    @asynccontextmanager
    async def listen(
        self, reference: str, endpoint: Endpoint, take: tunnels.Take
    ) -> AsyncIterator[tunnels.Listening]:
        """Have a guest listen at a port of its loopback until the context ends.

        :param take: called with each connection that is made there.
        :raise InvalidArgumentError: for an endpoint that cannot be.
        :raise FailedError: LISTEN_FAILED, and all that `dial` raises.
        """
        wanted = endpoints.checked(endpoint, listens=True, what="endpoint")
        async with AsyncExitStack() as stack:
            guest, _ = await self._running(reference)
            await stack.enter_async_context(self.open.one_more())
            yield await stack.enter_async_context(
                tunnels.listening(await guest.connection(), wanted, take)
            )

    @asynccontextmanager
    async def dial_ssh(self, reference: str, user: str, key: str = "") -> AsyncIterator[Dialed]:
        """A session of the guest's sshd, for one client; ended with the context.

        :param user: who may log in by it; "": root.
        :param key: may log in, beside the keys of `set_keys`; "": only those.
        :raise FailedError: SSHD_FAILED, and all that `dial` raises.
        """
        user = dialing.user_from(user)
        given = [keys.checked(key)] if key else []
        async with AsyncExitStack() as stack:
            guest, record = await self._running(reference)
            await stack.enter_async_context(self.open.one_more())
            kept = await self.world.read(lambda tx: ports.keys_of(tx, record.id, user))
            session = await stack.enter_async_context(
                dialing.session(
                    await guest.connection(),
                    user,
                    keys.all_checked([*given, *(each.key for each in kept)][: keys.MOST]),
                    list(record.env.items()),
                )
            )
            yield Dialed(record.id, session.far, session.host_keys)

    async def set_keys(
        self, reference: str, user: str, lines: Sequence[str]
    ) -> list[AuthorizedKey]:
        """Replace the keys by which one user may log in; returns them.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise DeniedError: AMBIGUOUS_NAME, INVALID_STATE, when it is over.
        :raise InvalidArgumentError: for a key, or too many.
        """
        user, checked = dialing.user_from(user), keys.all_checked(lines)

        def write(tx: Transaction) -> list[AuthorizedKey]:
            record = sandboxes.get(tx, sandboxes.resolve(tx, reference))
            if record.state.is_over:
                raise DeniedError(f"sandbox {record.name!r} is {record.state}", sandbox=record.id)
            ports.replace_keys(tx, record.id, user, checked)
            return ports.keys_of(tx, record.id, user)

        return await self.world.write(write)

    async def keys(self, reference: str, user: str = "") -> list[AuthorizedKey]:
        """The keys of one user, or of all.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise DeniedError: AMBIGUOUS_NAME.
        """
        return await self.world.read(
            lambda tx: ports.keys_of(tx, sandboxes.resolve(tx, reference), user)
        )

    async def _running(self, reference: str) -> tuple[Guest, Sandbox]:
        guest, record = await self.guests.find(reference)
        if record.state is not SandboxState.RUNNING:
            raise DeniedError(
                f"sandbox {record.name!r} is {record.state}: nothing can connect to it",
                sandbox=record.id,
            )
        return guest, record
