"""Snapshots as archives, for whoever has a link that was signed for them.

A link is at the door's own name, which is no preview's: `…/snapshots/ID?expires=…&signature=…`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

import h11

from stratabox.daemon.access.links import SNAPSHOTS, Links
from stratabox.daemon.config.kinds import TcpAddress
from stratabox.daemon.lifecycle.transfers.exports import Exports
from stratabox.daemon.lifecycle.world import World
from stratabox.daemon.previews.headers import Headers
from stratabox.daemon.previews.refusals import NOTHING, Refusal
from stratabox.storage.catalog import snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.ids import SnapshotId, is_id


@dataclass(frozen=True, kw_only=True)
class Download:
    """An archive that somebody may have."""

    world: World
    exports: Exports
    snapshot: SnapshotId

    @property
    def headers(self) -> Headers:
        """What is said of it."""
        name = f'attachment; filename="{self.snapshot}.sbx"'
        return [
            (b"content-type", b"application/octet-stream"),
            (b"content-disposition", name.encode()),
            (b"cache-control", b"private, no-store"),
            (b"x-content-type-options", b"nosniff"),
        ]

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Its bytes, with the memory that is saved in it, without the environment of commands.

        :raise StrataboxError: as ``Exports.snapshot``, before the first one.
        """

        def look(tx: Transaction) -> bool:
            return snapshots.get(tx, self.snapshot).ram is not None

        memory = await self.world.read(look)
        found = self.exports.snapshot(
            self.snapshot, since="", memory=memory, env=False, resume=None
        )
        async with aclosing(found):
            async for piece in found:
                yield piece.data


class Downloads:
    """Finds what a link leads to."""

    def __init__(self, world: World, exports: Exports, links: Links) -> None:
        self._world = world
        self._exports = exports
        self._links = links

    def find(self, request: h11.Request, host: str) -> Download:
        """The archive that a request asks for.

        :raise Refusal: there is none, or the link is not good (any more).
        """
        door = self._world.config.previews
        assert isinstance(door, TcpAddress), "the door is served"
        names = (door.target, f"{self._world.config.previews_domain}:{door.port}")
        parts = urlsplit(request.target.decode("latin-1"))
        snapshot = parts.path.removeprefix(SNAPSHOTS)
        if host.lower() not in names or not is_id(snapshot) or parts.path == snapshot:
            raise Refusal(*NOTHING)
        if request.method not in (b"GET", b"HEAD"):
            raise Refusal(405, "a download is read, with GET")
        query = parse_qs(parts.query)
        shown = {key: found[0] for key, found in query.items() if len(found) == 1}
        if not self._links.is_good(snapshot, shown.get("expires", ""), shown.get("signature", "")):
            raise Refusal(403, "this link is not good, or not any more: ask for another")
        return Download(world=self._world, exports=self._exports, snapshot=SnapshotId(snapshot))
