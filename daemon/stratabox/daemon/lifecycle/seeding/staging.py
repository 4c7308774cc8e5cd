"""Seeds of new sandboxes, from what is wished for to a file that becomes a blob."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from stratabox.daemon.hypervisor.guest.identity import hostname_of
from stratabox.daemon.lifecycle.common.naming import make_up
from stratabox.daemon.lifecycle.common.threads import in_thread, settle
from stratabox.daemon.lifecycle.creation import NewSandbox
from stratabox.daemon.lifecycle.seeding import disk
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import images
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.files import durable
from stratabox.storage.model.errors import StrataboxError
from stratabox.storage.model.ids import SandboxId, Sha256
from stratabox.storage.model.network import NO_NETWORK


@asynccontextmanager
async def seeded(world: World, wanted: NewSandbox, sandbox: SandboxId) -> AsyncIterator[NewSandbox]:
    """The same wish, with its seed in a file meanwhile where its image needs one.

    :raise NoSpaceError: NO_SPACE.
    """
    if not await world.read(lambda tx: _is_for_cloud_init(world, tx, wanted)):
        yield wanted
        return
    name = wanted.name or make_up()
    path = world.store.layout.work / f"seed-{sandbox}"

    def write() -> Sha256:
        content = disk.seed(
            instance=sandbox,
            hostname=hostname_of(name, sandbox),
            user_data=wanted.user_data,
            keys=wanted.ssh_keys,
            offline=(wanted.network or world.config.network) == NO_NETWORK,
        )
        with durable.naming_a_full_disk():
            path.write_bytes(content)
        return Sha256(hashlib.sha256(content).hexdigest())

    try:
        digest = await in_thread(write)
        try:
            yield replace(wanted, name=name, seed=path)
        except BaseException:
            # It may be a blob already, that of a sandbox which was refused, or undone.
            await settle(world.drop_seed(digest))
            raise
    finally:
        await in_thread(path.unlink, missing_ok=True)


def _is_for_cloud_init(world: World, tx: Transaction, wanted: NewSandbox) -> bool:
    reference = wanted.image or world.config.default_image
    if wanted.snapshot or not reference:
        return False
    try:
        return images.get(tx, images.resolve(tx, reference)).cloud_init
    except StrataboxError:
        return False  # for the transaction that writes to say
