"""At start: what sealed layers and saved memory take, where the catalog does not say it yet.

Those of before it did, and those whose sealing failed. In portions, so that nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import layers, rams
from stratabox.storage.model.ids import LayerId

_PORTION = 1000
_Id = TypeVar("_Id", bound=str)


async def fill(world: World) -> None:
    """Look at the files, and write it down. What has no file stays without a size."""
    store = world.store

    def look(layer: LayerId) -> int:
        return store.bytes_of([layer])

    def look_at_memory(ram: str) -> int:
        return store.ram_bytes([ram])

    for some in _portions(await world.read(layers.without_bytes)):
        await world.write(partial(layers.set_bytes, sizes=await _look_at(some, look)))
    for those in _portions(await world.read(rams.without_bytes)):
        await world.write(partial(rams.set_bytes, sizes=await _look_at(those, look_at_memory)))


def _portions(ids: Sequence[_Id]) -> Iterator[Sequence[_Id]]:
    for begin in range(0, len(ids), _PORTION):
        yield ids[begin : begin + _PORTION]


async def _look_at(ids: Sequence[_Id], size_of: Callable[[_Id], int]) -> dict[_Id, int]:
    return await in_thread(lambda: {id: size_of(id) for id in ids})
