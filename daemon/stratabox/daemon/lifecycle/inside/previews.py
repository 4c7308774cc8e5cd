"""Previews: web pages of guests under addresses that nobody can guess.

```
 expose a port, or create and bind ─▶ row ─▶ `visits`, one for each request ─▶ the guest's port
                                       │                                 │
     unexpose, unbind, delete, time up, or the sandbox is over ──────────┴─▶ connections are closed
```

Each has an origin of its own, `SLUG-TOKEN.DOMAIN`, so that the pages of two guests, and the API,
are strangers to each other in a browser. The HTTP door that serves them is ``daemon.previews``.
Rows are of one sandbox: copies have none of them.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from stratabox.daemon.config.kinds import TcpAddress
from stratabox.daemon.lifecycle.common.naming import make_up
from stratabox.daemon.lifecycle.inside.visits import TOKEN, Visits
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import previews, sandboxes, tenki_sessions
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import (
    AlreadyExistsError,
    DeniedError,
    InvalidArgumentError,
    NoSpaceError,
)
from stratabox.storage.model.ids import PreviewId, mint
from stratabox.storage.model.previews import Preview
from stratabox.storage.model.records import Sandbox

MOST_EXPOSED = 32
"""Ports of one sandbox that previews lead to."""
MOST = 1000
"""Previews of one workspace."""

_SLUG = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_SLUG_LENGTHS = range(3, 64)
_SHOWN_SLUG = 36
"""Characters of a slug that fit into a label of the DNS before the token."""


@dataclass(frozen=True, kw_only=True)
class PreviewStatus:
    """A preview, and what it leads to."""

    preview: Preview
    url: str
    sandbox: Sandbox | None


class Previews:
    """The use cases of previews."""

    def __init__(self, world: World, visits: Visits) -> None:
        self._world = world
        self._visits = visits

    async def expose(
        self,
        reference: str,
        port: int,
        *,
        slug: str = "",
        expires_at: datetime | None = None,
    ) -> PreviewStatus:
        """Have a preview lead to a port of a guest.

        A port that is exposed already keeps its preview, which then ends when it is asked for now.

        :param slug: its name; of one that leads nowhere, that one is taken. "": made up.
        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise InvalidArgumentError: for a port, slug or time that cannot be.
        :raise AlreadyExistsError: PREVIEW_ALREADY_EXISTS, when the slug leads elsewhere.
        :raise DeniedError: INVALID_STATE, INBOUND_DISABLED, PREVIEWS_DISABLED, AMBIGUOUS_NAME.
        :raise NoSpaceError: TOO_MANY_PORTS, TOO_MANY_PREVIEWS.
        """
        self._require_served()
        _check_port(port)
        _check_expiry(expires_at)
        if slug:
            _check_slug(slug)

        def write(tx: Transaction) -> Preview:
            record = self._bindable(tx, reference)
            bound = [each for each in previews.of_sandbox(tx, record.id) if each.port == port]
            mine = next((each for each in bound if slug in ("", each.slug)), None)
            if mine is None and slug:
                mine = previews.find_slug(tx, slug)
                if mine is not None and mine.is_bound:
                    raise AlreadyExistsError(
                        "the preview with that slug leads to another port: unbind it, or choose"
                        " another slug",
                        reason="PREVIEW_ALREADY_EXISTS",
                        preview=mine.id,
                    )
            if mine is None:
                mine = _new(tx, slug or _made_up(tx), exposed=True)
                self._require_room(tx, record)
                previews.insert(tx, mine)
            elif not mine.is_bound:
                self._require_room(tx, record, fresh=False)
            return previews.change(tx, mine, sandbox=record.id, port=port, expires_at=expires_at)

        return await self._written(write)

    async def unexpose(self, reference: str, port: int) -> None:
        """Have no preview lead to a port any more; none did: that is fine.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        """

        def write(tx: Transaction) -> list[Preview]:
            sandbox = sandboxes.resolve(tx, reference)
            found = [each for each in previews.of_sandbox(tx, sandbox) if each.port == port]
            for each in found:
                _unbind(tx, each)
            return found

        for each in await self._world.write(write):
            await self._visits.close(each.id)

    async def of_sandbox(self, reference: str) -> list[PreviewStatus]:
        """The previews that lead to a sandbox, by port.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        """

        def look(tx: Transaction) -> list[PreviewStatus]:
            previews.sweep(tx)
            found = previews.of_sandbox(tx, sandboxes.resolve(tx, reference))
            return [self._status(tx, each) for each in found if not each.is_over(tx.now)]

        return await self._world.write(look)

    async def create(
        self,
        slug: str,
        *,
        sandbox: str = "",
        port: int = 0,
        expires_at: datetime | None = None,
    ) -> PreviewStatus:
        """Make a preview, which stays until it is deleted.

        :param sandbox: what it leads to, with the port; "": nothing yet.
        :raise: as `expose`.
        """
        self._require_served()
        _check_slug(slug)
        _check_expiry(expires_at)
        if bool(sandbox) != bool(port):
            raise InvalidArgumentError("a preview leads to a session and a port", field="port")
        if port:
            _check_port(port)

        def write(tx: Transaction) -> Preview:
            made = _new(tx, slug, exposed=False, expires_at=expires_at)
            record = self._bindable(tx, sandbox) if sandbox else None
            self._require_room(tx, record)
            previews.insert(tx, made)
            if record is None:
                return made
            return previews.change(tx, made, sandbox=record.id, port=port)

        return await self._written(write)

    async def bind(
        self, preview: str, sandbox: str, port: int, expires_at: datetime | None
    ) -> PreviewStatus:
        """Have a preview lead to a port of a guest, wherever it led before.

        :raise NotFoundError: PREVIEW_NOT_FOUND, SANDBOX_NOT_FOUND.
        :raise: as `expose`.
        """
        self._require_served()
        _check_port(port)
        _check_expiry(expires_at)

        def write(tx: Transaction) -> Preview:
            mine = previews.get(tx, preview)
            record = self._bindable(tx, sandbox)
            if mine.sandbox != record.id:
                self._require_room(tx, record, fresh=False)
            return previews.change(tx, mine, sandbox=record.id, port=port, expires_at=expires_at)

        status = await self._written(write)
        await self._visits.close(status.preview.id)
        return status

    async def unbind(self, preview: str) -> PreviewStatus:
        """Have a preview lead nowhere. :raise NotFoundError: PREVIEW_NOT_FOUND."""

        def write(tx: Transaction) -> PreviewStatus:
            mine = previews.get(tx, preview)
            found = self._status(tx, previews.change(tx, mine, sandbox=None, port=None))
            if mine.exposed:
                previews.delete(tx, mine.id)
            return found

        status = await self._world.write(write)
        await self._visits.close(status.preview.id)
        return status

    async def delete(self, preview: str) -> None:
        """Remove a preview. :raise NotFoundError: PREVIEW_NOT_FOUND."""

        def write(tx: Transaction) -> Preview:
            mine = previews.get(tx, preview)
            previews.delete(tx, mine.id)
            return mine

        await self._visits.close((await self._world.write(write)).id)

    async def get(self, *, preview: str = "", slug: str = "") -> PreviewStatus:
        """One preview, by its id or slug. :raise NotFoundError: PREVIEW_NOT_FOUND."""

        def look(tx: Transaction) -> PreviewStatus:
            previews.sweep(tx)
            if not slug:
                return self._status(tx, previews.get(tx, preview))
            found = previews.find_slug(tx, slug)
            if found is None:
                raise previews.missing(slug)
            return self._status(tx, found)

        return await self._world.write(look)

    async def list(
        self,
        *,
        size: int,
        after: tuple[str, str] | None = None,
        sandbox: str = "",
    ) -> list[PreviewStatus]:
        """Some of the previews, newest first; `size` of them unless there are no more.

        :param after: ``age_of`` and id of the last one of the page before.
        :param sandbox: only those that lead to it.
        :raise NotFoundError: SANDBOX_NOT_FOUND.
        """

        def look(tx: Transaction) -> list[PreviewStatus]:
            previews.sweep(tx)
            only = sandboxes.resolve(tx, sandbox) if sandbox else None
            found = previews.page(tx, size=size, after=after, sandbox=only)
            return [self._status(tx, each) for each in found]

        return await self._world.write(look)

    def origin(self) -> str:
        """Where the door itself is found, which is no preview's address.

        :raise DeniedError: PREVIEWS_DISABLED.
        """
        door = self._require_served()
        named = f"{self._world.config.previews_domain}:{door.port}"
        host = door.target if door.is_loopback else named
        return f"{_scheme(door)}://{host}"

    async def _written(self, write: Callable[[Transaction], Preview]) -> PreviewStatus:
        def change(tx: Transaction) -> PreviewStatus:
            previews.sweep(tx)
            return self._status(tx, write(tx))

        return await self._world.write(change)

    def _status(self, tx: Transaction, preview: Preview) -> PreviewStatus:
        record = sandboxes.get(tx, preview.sandbox) if preview.sandbox else None
        return PreviewStatus(preview=preview, url=self._url(preview), sandbox=record)

    def _url(self, preview: Preview) -> str:
        door = self._world.config.previews
        if door is None:
            return ""
        label = f"{preview.slug[:_SHOWN_SLUG].rstrip('-')}-{preview.token}"
        return f"{_scheme(door)}://{label}.{self._world.config.previews_domain}:{door.port}"

    def _bindable(self, tx: Transaction, reference: str) -> Sandbox:
        record = sandboxes.get(tx, sandboxes.resolve(tx, reference))
        if record.state.is_over:
            raise DeniedError(f"sandbox {record.id} is {record.state}", sandbox=record.id)
        if not tenki_sessions.of(tx, record.id).inbound:
            raise DeniedError(
                "inbound access is disabled: that is said when a session is created",
                reason="INBOUND_DISABLED",
                sandbox=record.id,
            )
        return record

    def _require_room(self, tx: Transaction, record: Sandbox | None, *, fresh: bool = True) -> None:
        if record is not None and len(previews.of_sandbox(tx, record.id)) >= MOST_EXPOSED:
            raise NoSpaceError(
                f"{MOST_EXPOSED} are the maximum exposed ports of a sandbox: unexpose one first",
                reason="TOO_MANY_PORTS",
                limit=MOST_EXPOSED,
            )
        if fresh and previews.count(tx) >= MOST:
            raise NoSpaceError(
                f"there are {MOST} previews, and more cannot be: delete some first",
                reason="TOO_MANY_PREVIEWS",
                limit=MOST,
            )

    def _require_served(self) -> TcpAddress:
        door = self._world.config.previews
        if door is None:
            raise DeniedError(
                "previews are not served: set `previews` in the daemon's configuration, as"
                ' "http://127.0.0.1:8081"',
                reason="PREVIEWS_DISABLED",
            )
        return door


def _scheme(door: TcpAddress) -> str:
    return "https" if door.tls else "http"


def _new(
    tx: Transaction, slug: str, *, exposed: bool, expires_at: datetime | None = None
) -> Preview:
    return Preview(
        id=PreviewId(mint()),
        workspace=tx.home,
        slug=slug,
        token=base64.b32encode(secrets.token_bytes(17)).decode().lower()[:TOKEN],
        exposed=exposed,
        sandbox=None,
        port=None,
        expires_at=expires_at,
        created_at=tx.now,
        updated_at=tx.now,
        accessed_at=None,
    )


def _made_up(tx: Transaction) -> str:
    while previews.find_slug(tx, found := make_up()) is not None:
        pass
    return found


def _unbind(tx: Transaction, preview: Preview) -> None:
    if preview.exposed:
        previews.delete(tx, preview.id)
    else:
        previews.change(tx, preview, sandbox=None, port=None)


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise InvalidArgumentError(f"port {port} is not from 1 to 65535", field="port")


def _check_slug(slug: str) -> None:
    if len(slug) not in _SLUG_LENGTHS or not _SLUG.fullmatch(slug):
        raise InvalidArgumentError(
            "a slug has 3 to 63 of a-z, 0-9 and -, and begins and ends without -", field="slug"
        )


def _check_expiry(expires_at: datetime | None) -> None:
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise InvalidArgumentError("expires_at is not in the future", field="expires_at")
