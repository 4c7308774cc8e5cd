"""Finds layers by what they read as, and finds that out where nobody has yet."""

from __future__ import annotations

import logging
from collections.abc import Callable

from stratabox.daemon.lifecycle.transfers.packing import content_of
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import contents, layers
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import CorruptError, DeniedError
from stratabox.storage.model.ids import LayerId, Sha256
from stratabox.storage.qcow2.clusters import Clusters

log = logging.getLogger(__name__)


async def name_of(world: World, layer: LayerId) -> Sha256:
    """What a sealed layer reads as; each layer of its chain is read once at most, ever.

    :raise CorruptError: LAYER_MISSING, LAYER_CORRUPT.
    """

    def next_unknown(tx: Transaction) -> tuple[LayerId, bool, Clusters, Sha256 | None] | Sha256:
        """The lowest layer that is to be read, and what its parent reads as."""
        below = None
        for each in reversed(layers.chain(tx, layer)):
            if each.reads_as is None:
                # Opened where no sweep can come between.
                opened = Clusters(world.store.layout.layer(each.id))
                return each.id, each.parent is not None, opened, below
            below = each.reads_as
        assert below is not None
        return below

    while True:
        found = await world.read(next_unknown)
        if isinstance(found, str):
            return found
        lowest, stands, opened, below = found
        content = await content_of(opened, stands=stands)
        await world.write(_noting(lowest, content, below))


async def find(world: World, name: Sha256, size: int, *, bottom: bool) -> LayerId | None:
    """A sealed layer that reads as this, where there is one.

    :param bottom: it can be an image's: those are looked at that nobody has looked at yet.
    """
    found = await world.read(lambda tx: contents.reading_as(tx, name, size))
    if found is not None or not bottom:
        return found
    for layer in await world.read(lambda tx: contents.unknown_images(tx, size)):
        try:
            if await name_of(world, layer) == name:
                return layer
        except CorruptError as error:
            log.warning("an image cannot be compared: %s", error.message)
    return None


def missing_base(what: str) -> DeniedError:
    """The error for something that an archive stands on and that is not here."""
    return DeniedError(
        f"the archive stands on what is not here ({what}): import the snapshot that it was exported"
        " since first, or export it again without --since",
        reason="MISSING_BASE",
        missing=what,
    )


def _noting(layer: LayerId, content: Sha256, below: Sha256 | None) -> Callable[[Transaction], None]:
    return lambda tx: contents.note(tx, layer, content, below)
