"""The calls about snapshots: convert, make one call, convert back."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import Response

from stratabox.daemon.lifecycle.creation import NewSandbox
from stratabox.daemon.lifecycle.sandboxes import Sandboxes
from stratabox.daemon.lifecycle.snapshots import Snapshots
from stratabox.daemon.lifecycle.world import World
from stratabox.daemon.rest import convert, models
from stratabox.daemon.rest.replies import (
    IdempotencyKey,
    PageSize,
    PageToken,
    Reference,
    one,
    page,
)
from stratabox.storage.catalog import lookup, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.records import Snapshot


@dataclass(frozen=True, kw_only=True)
class SnapshotCalls:
    """The endpoints under /v1/snapshots."""

    world: World
    sandboxes: Sandboxes
    snapshots: Snapshots

    async def list_snapshots(
        self, page_size: PageSize = lookup.LARGEST_PAGE, page_token: PageToken = None
    ) -> Response:
        """List snapshots, newest first. The Link header leads to the next page, if there is one."""
        wanted = lookup.Page(size=page_size, token=page_token or "")

        def look(tx: Transaction) -> Response:
            records, token = snapshots.list_page(tx, snapshots.Filter(), wanted)
            found = [convert.snapshot(record) for record in records]
            return page(models.Snapshot, found, "/v1/snapshots/list", page_size, token)

        return await self.world.read(look)

    async def get_snapshot(self, snapshot_id: Reference) -> Response:
        """Return one snapshot."""

        def look(tx: Transaction) -> Snapshot:
            return snapshots.get(tx, snapshots.resolve(tx, snapshot_id))

        return one(convert.snapshot(await self.world.read(look)))

    async def delete_snapshot(self, snapshot_id: Reference) -> Response:
        """Remove a snapshot. What was restored from it stays."""
        return one(models.Deleted(id=(await self.snapshots.delete(snapshot_id)).id))

    async def restore_snapshot(
        self,
        snapshot_id: Reference,
        body: models.RestoreRequest | None = None,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        """Make a new sandbox from a snapshot."""
        body = body or models.RestoreRequest()
        wanted = NewSandbox(
            snapshot=snapshot_id,
            name=body.name or "",
            resources=convert.resources(body.resources),
            ready_timeout=self.world.config.ready_timeout if body.wait_for_ready else None,
        )
        key = convert.key(idempotency_key, "restore", snapshot_id, body)
        return one(convert.sandbox(await self.sandboxes.create(wanted, key)), status=201)
