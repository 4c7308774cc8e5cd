"""A running domain's chains, brought to where the catalog has them: layers that were replaced go.

```
 catalog    top ─▶ X' ─────────────▶ base        X' was written anew: it reads the same as X
 QEMU       top ─▶ X ─▶ … ─▶ lowest ─▶ base      of before
 here       X' is added on base, top is reopened with X' below it, X … lowest are taken out
```

The guest reads on meanwhile: each step takes QEMU a few milliseconds, and in between all is as
good as before or after. What is to be done is asked of QEMU's block graph, so it can be begun
again from wherever somebody was killed. All by node names, as in `block`.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stratabox.daemon.hypervisor.block import BLOCK_SECONDS, BlockGraph
from stratabox.daemon.hypervisor.command_line import layer_node
from stratabox.daemon.hypervisor.launch_files import READ, WRITE, opaque
from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.daemon.hypervisor.monitor import Monitor
from stratabox.storage.model.errors import CorruptError, FailedError

AT_ONCE = 4
"""Nodes that are taken out before others have their turn."""


@dataclass(frozen=True)
class _Graph:
    below: Mapping[str, str | None]
    """Node → what it is on, of all that QEMU has."""
    above: Counter[str]
    """How many nodes, devices and jobs use each."""


async def take_over(
    monitor: Monitor, disks: BlockGraph, chains: Sequence[Sequence[ChainLayer]]
) -> int:
    """Bring the domain's chains nearer to what is given; cheap where they are there. Idempotent.

    A few milliseconds' worth is done: to be called again, after others had their turn, until
    nothing was left to do. The caller holds the guest's lock: nothing else may add or take out
    nodes meanwhile.

    :param chains: of every disk and volume of the domain, each with its top first. One whose top
        QEMU does not have is passed over.
    :return: how many nodes were reopened or taken out; 0: the chains stand as given.
    :raise FailedError: QEMU_FAILED; the chains read as before.
    :raise CorruptError: LAYER_MISSING, when a file is not there; likewise.
    :raise UnavailableError: MONITOR_UNAVAILABLE; likewise.
    """
    graph = await _look(monitor)
    for chain in chains:
        changed = await _stand(monitor, disks, graph, chain)
        if changed:
            return changed
    return await _clear(monitor, disks, graph, chains)


async def _stand(
    monitor: Monitor, disks: BlockGraph, graph: _Graph, chain: Sequence[ChainLayer]
) -> int:
    """Have one chain stand as given; how many nodes were reopened."""
    wanted = {
        layer.node: below.node if below else None
        for layer, below in zip(chain, [*chain[1:], None], strict=True)
    }
    if chain[0].node not in graph.below or all(
        graph.below.get(node, below) == below for node, below in wanted.items()
    ):
        return 0
    read_only = await disks.nodes()
    reopened = 0
    for layer in reversed(chain):
        below = wanted[layer.node]
        if layer.node not in graph.below:
            await _add(monitor, layer, below)
        elif graph.below[layer.node] != below:
            options = layer_node(layer, "", read_only=read_only[layer.node], backing=below)
            options["file"] = layer.file_node  # as it is
            await monitor.execute(
                "blockdev-reopen", {"options": [options]}, repeatable=True, seconds=BLOCK_SECONDS
            )
            reopened += 1
    return reopened


async def _add(monitor: Monitor, layer: ChainLayer, below: str | None) -> None:
    try:
        descriptor = await asyncio.to_thread(
            os.open, layer.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        )
    except FileNotFoundError as error:
        raise CorruptError(
            f"{layer.path} is missing from the store.", reason="LAYER_MISSING", path=layer.path
        ) from error
    except OSError as error:
        raise FailedError(
            f"{layer.path} cannot be opened: {error.strerror}.", reason="QEMU_FAILED"
        ) from error
    try:
        number = await monitor.add_descriptor(descriptor, opaque(READ, layer))
    finally:
        os.close(descriptor)
    node = layer_node(layer, f"/dev/fdset/{number}", read_only=True, backing=below)
    await monitor.execute("blockdev-add", node, seconds=BLOCK_SECONDS)


async def _clear(
    monitor: Monitor,
    disks: BlockGraph,
    graph: _Graph,
    chains: Sequence[Sequence[ChainLayer]],
) -> int:
    """Take out some of the layers that nothing uses and no chain has; how many."""
    wanted = {layer.node for chain in chains for layer in chain}
    above = graph.above.copy()
    unused = [node for node in graph.below if not above[node]]
    gone: list[str] = []
    while unused and len(gone) < AT_ONCE:
        node = unused.pop()
        if node in wanted or not ChainLayer.is_node(node):
            continue
        await monitor.execute("blockdev-del", {"node-name": node})
        gone.append(node)
        below = graph.below[node]
        if below is not None:
            above[below] -= 1
            if not above[below]:
                unused.append(below)
    await disks.forget([f"{mode}:{node}" for node in gone for mode in (WRITE, READ)])
    return len(gone)


async def _look(monitor: Monitor) -> _Graph:
    answer = await monitor.execute("x-debug-query-block-graph", repeatable=True)
    nodes, edges = _lists(answer, "nodes"), _lists(answer, "edges")
    names = {each["id"]: str(each["name"]) for each in nodes if each["type"] == "block-driver"}
    below: dict[str, str | None] = dict.fromkeys(names.values())
    above: Counter[str] = Counter()
    for edge in edges:
        child = names.get(edge["child"])
        if child is None:
            continue
        above[child] += 1
        if edge["name"] == "backing" and edge["parent"] in names:
            below[names[edge["parent"]]] = child
    return _Graph(below=below, above=above)


def _lists(answer: object, key: str) -> Sequence[Mapping[str, object]]:
    found = answer.get(key) if isinstance(answer, Mapping) else None
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []
