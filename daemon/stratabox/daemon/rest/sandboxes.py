"""The calls about sandboxes: convert, make one call, convert back."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import Response, StreamingResponse

from stratabox.daemon.lifecycle.clones import Clones, NewClone
from stratabox.daemon.lifecycle.creation import NewSandbox
from stratabox.daemon.lifecycle.running import power
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.sandboxes import Sandboxes
from stratabox.daemon.lifecycle.snapshots import NewSnapshot, Snapshots
from stratabox.daemon.lifecycle.world import World
from stratabox.daemon.rest import convert, models
from stratabox.daemon.rest.output import of_command
from stratabox.daemon.rest.replies import (
    JSON,
    IdempotencyKey,
    PageSize,
    PageToken,
    Reference,
    one,
    page,
)
from stratabox.storage.catalog import images, lookup, sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError
from stratabox.storage.model.network import PUBLIC, NetworkMode, network
from stratabox.storage.model.states import Level, SandboxState

AKIRAS_DEFAULT = "akiralabs/akira-default-sandbox"
"""What Akira's users call the image that they get when they want none in particular."""


@dataclass(frozen=True, kw_only=True)
class SandboxCalls:
    """The endpoints under /v1/sandboxes."""

    world: World
    guests: Guests
    sandboxes: Sandboxes
    snapshots: Snapshots
    clones: Clones

    async def create_sandbox(
        self, body: models.CreateRequest | None = None, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """Create a sandbox from an image. It reaches every public address."""
        body = body or models.CreateRequest()
        wanted = NewSandbox(
            image=self._image(body.image),
            name=body.name or "",
            resources=convert.resources(body.resources),
            env=body.env,
            network=network(NetworkMode.EGRESS, (PUBLIC,)),
            ready_timeout=self._ready_timeout(body.wait_for_ready),
        )
        key = convert.key(idempotency_key, "create", "", body)
        return one(convert.sandbox(await self.sandboxes.create(wanted, key)), status=201)

    async def list_sandboxes(
        self, page_size: PageSize = lookup.LARGEST_PAGE, page_token: PageToken = None
    ) -> Response:
        """List sandboxes, newest first. The Link header leads to the next page, if there is one."""
        wanted = lookup.Page(size=page_size, token=page_token or "")

        def look(tx: Transaction) -> Response:
            records, token = sandboxes.list_page(tx, sandboxes.Filter(), wanted)
            found = [convert.sandbox(record) for record in records]
            return page(models.Sandbox, found, "/v1/sandboxes/list", page_size, token)

        return await self.world.read(look)

    async def get_sandbox(self, sandbox_id: Reference) -> Response:
        """Return one sandbox."""
        _, record = await self.guests.find(sandbox_id)
        return one(convert.sandbox(record))

    async def delete_sandbox(self, sandbox_id: Reference) -> Response:
        """End a sandbox and remove it. Its snapshots stay."""
        return one(models.Deleted(id=await self.sandboxes.delete(sandbox_id)))

    async def pause_sandbox(self, sandbox_id: Reference) -> Response:
        """Hold a sandbox's guest; its memory stays where it is."""
        guest, _ = await self.guests.find(sandbox_id)
        record = await self.world.tasks.see_through(power.pause(self.world, guest))
        return one(convert.sandbox(record))

    async def resume_sandbox(self, sandbox_id: Reference) -> Response:
        """Let a paused sandbox's guest go on."""
        guest, _ = await self.guests.find(sandbox_id)
        record = await self.world.tasks.see_through(power.resume(self.world, guest))
        return one(convert.sandbox(record))

    async def execute_command(self, sandbox_id: Reference, body: models.ExecuteRequest) -> Response:
        """Run a command in a sandbox and return what it printed.

        A sandbox that is being created is waited for. A command that fails is an answer, not an
        error: look at `exit_code`.
        """
        guest = await self._awake(sandbox_id)
        result = await power.execute(
            guest,
            ["/bin/sh", "-c", body.command],
            env=body.env,
            cwd=body.cwd or "",
            timeout=body.timeout,
        )
        return StreamingResponse(of_command(result), media_type=JSON)

    async def snapshot_sandbox(
        self,
        sandbox_id: Reference,
        body: models.SnapshotRequest | None = None,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        """Take a snapshot of a sandbox, which runs on. It is ready when this answers."""
        body = body or models.SnapshotRequest()
        if not body.quick:
            await self._awake(sandbox_id)
        wanted = NewSnapshot(name=body.name or "", level=_level(body.quick))
        key = convert.key(idempotency_key, "snapshot", sandbox_id, body)
        return one(
            convert.snapshot(await self.snapshots.create(sandbox_id, wanted, key=key)), status=201
        )

    async def clone_sandbox(
        self,
        sandbox_id: Reference,
        body: models.CloneRequest | None = None,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        """Take a snapshot of a sandbox and restore it at once as a new one."""
        body = body or models.CloneRequest()
        if body.image is not None:
            await self._require_image(sandbox_id, body.image)
        if not body.quick:
            await self._awake(sandbox_id)
        wanted = NewClone(
            name=body.name or "",
            snapshot_name=body.snapshot_name or "",
            resources=convert.resources(body.resources),
            level=_level(body.quick),
            ready_timeout=self._ready_timeout(body.wait_for_ready),
        )
        key = convert.key(idempotency_key, "clone", sandbox_id, body)
        done = await self.clones.clone(sandbox_id, wanted, key)
        (copy,) = done.copies
        if isinstance(copy, Exception):
            raise copy
        made = models.Clone(sandbox=convert.sandbox(copy), snapshot=convert.snapshot(done.snapshot))
        return one(made, status=201)

    async def _awake(self, reference: str) -> Guest:
        """The guest of a sandbox; of one that has been started, once it has answered.

        :raise StrataboxError: as ``Guest.wait_ready``.
        """
        guest, record = await self.guests.find(reference)
        if record.state is SandboxState.RUNNING and not record.ready:
            await guest.wait_ready(self.world.config.ready_timeout)
        return guest

    def _ready_timeout(self, wait: bool) -> float | None:
        return self.world.config.ready_timeout if wait else None

    def _image(self, named: str | None) -> str:
        """The image that a request means; "" for the default.

        :raise DeniedError: NO_DEFAULT_IMAGE, when none is named and none is configured.
        """
        if named is not None and named != AKIRAS_DEFAULT:
            return named
        if not self.world.config.default_image:
            raise DeniedError(
                "the daemon's configuration has no default_image: name an image",
                reason="NO_DEFAULT_IMAGE",
            )
        return ""

    async def _require_image(self, reference: str, named: str) -> None:
        """:raise InvalidArgumentError: IMAGE_FIXED, for another image than the source's."""
        wanted = self._image(named) or self.world.config.default_image or ""
        _, source = await self.guests.find(reference)
        if wanted in (source.image, source.image_name):
            return
        if await self.world.read(lambda tx: images.resolve(tx, wanted)) != source.image:
            raise InvalidArgumentError(
                f"image cannot be {named!r}: a clone has its source's disks, which were made from"
                f" {source.image_name!r}. Leave image out, or create a sandbox from that image",
                reason="IMAGE_FIXED",
                field="image",
                fixed=source.image_name,
            )


def _level(quick: bool) -> Level:
    return Level.CRASH if quick else Level.APPLICATION
