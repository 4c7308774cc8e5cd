"""Overlays under a running guest: made known, switched to in one instant, or taken back.

All is done by the layers' node names, which come from their ids. So an overlay that a daemon
prepared before it died can be dropped by the next one, and what was reached is asked of QEMU's
block graph and never guessed.

QEMU gets descriptors in sets (``add-fd``), labelled ``rw:NODE`` and ``ro:NODE``. When an overlay
goes on top of a layer QEMU reopens that layer by its reading descriptor, and we take the writing
one away: from then on this QEMU can't write the layer, whatever its guest makes of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence

from stratabox.daemon.hypervisor.command_line import layer_node
from stratabox.daemon.hypervisor.launch_files import READ, WRITE, opaque
from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.daemon.hypervisor.monitor import Monitor
from stratabox.daemon.hypervisor.qmp import ReplyLostError
from stratabox.storage.model.errors import (
    CorruptError,
    FailedError,
    InternalError,
    StrataboxError,
    UnavailableError,
)

BLOCK_SECONDS = 120.0
"""Time-out of commands that write to disk: a flush can take long on a slow host."""

_DEVICE = re.compile(r"disk(\d+)")
_DRIVE = re.compile(r"(?:disk|vol)\d+")


class BlockGraph:
    """The disks of one running domain."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    async def active_layers(self) -> dict[int, str]:
        """Index of each disk → node of the layer that its guest writes now.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        children = await self._ask("qom-list", {"path": "/machine/peripheral"})
        active = {}
        for child in _mappings(children):
            match = _DEVICE.fullmatch(str(child.get("name")))
            if match:
                where = {"path": f"/machine/peripheral/{match[0]}", "property": "drive"}
                active[int(match[1])] = str(await self._ask("qom-get", where))
        return active

    async def _written(self) -> set[str]:
        """Nodes that the guest's disks and volumes begin with."""
        children = await self._ask("qom-list", {"path": "/machine/peripheral"})
        names = [str(child.get("name")) for child in _mappings(children)]
        return {
            str(
                await self._ask(
                    "qom-get", {"path": f"/machine/peripheral/{name}", "property": "drive"}
                )
            )
            for name in names
            if _DRIVE.fullmatch(name)
        }

    async def nodes(self) -> dict[str, bool]:
        """Every node of the block graph → whether it is read-only.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        answer = await self._ask("query-named-block-nodes", {"flat": True})
        return {str(node.get("node-name")): bool(node.get("ro")) for node in _mappings(answer)}

    async def prepare(self, overlays: Sequence[ChainLayer]) -> None:
        """Make new overlays known to QEMU, on top of nothing yet. The guest notices nothing.

        When it fails, what was prepared is dropped again.

        :raise FailedError: QEMU_FAILED, when QEMU does not take one.
        :raise CorruptError: LAYER_MISSING, when a file is not there.
        :raise UnavailableError: MONITOR_UNAVAILABLE; then `drop` before trying again.
        """
        try:
            for overlay in overlays:
                await self._add(await self._give(overlay))
        except StrataboxError as error:
            if not isinstance(error, UnavailableError):
                await self.drop(overlays)
            raise

    async def switch(self, pairs: Sequence[tuple[ChainLayer, ChainLayer]]) -> None:
        """Put each pair's new overlay on top of its old one: all disks at one instant, or none.

        Guest writes stall meanwhile and go to the new overlays afterwards; QEMU has flushed the
        old ones. On return the old ones are read-only for QEMU. A lost reply is settled by asking
        the block graph.

        :raise FailedError: QEMU_FAILED, when QEMU refused; nothing was switched.
        :raise UnavailableError: MONITOR_UNAVAILABLE, when it is not known; ask `active_layers`
            when QEMU answers again.
        """
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": old.node, "overlay": new.node}}
            for old, new in pairs
        ]
        switching = asyncio.create_task(
            self._monitor.execute("transaction", {"actions": actions}, seconds=BLOCK_SECONDS)
        )
        # Sent behind it at once: QEMU does one after the other, so this tells of the time after.
        looking = asyncio.create_task(self._look())
        try:
            await switching
            nodes, labels = await looking
        except ReplyLostError as lost:
            await self._monitor.settle(lost, BLOCK_SECONDS)
            active = await self._written()
            if not active >= {new.node for _, new in pairs}:
                raise FailedError(
                    "QEMU did not switch to the new overlays.", reason="QEMU_FAILED"
                ) from lost
            nodes, labels = await self._look()
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        await self._confirm_sealed([old for old, _ in pairs], nodes, labels)

    async def prepare_and_switch(self, pairs: Sequence[tuple[ChainLayer, ChainLayer]]) -> float:
        """`prepare` the new overlays and `switch` to them, without waiting in between.

        :return: seconds for which the guest's writes have stalled at most. That the overlays were
            made known is in it: how far QEMU was when its replies were read nobody knows.
        :raise StrataboxError: as these two do; `drop` the overlays where nothing was switched.
        """
        nodes = [await self._give(new) for _, new in pairs]
        begun = time.monotonic()
        adding = [asyncio.create_task(self._add(node)) for node in nodes]
        # Sent behind them at once: where QEMU has refused one of them, it refuses the switch.
        switching = asyncio.create_task(self.switch(pairs))
        try:
            await asyncio.gather(*adding)
            await switching
        finally:
            await asyncio.gather(*adding, switching, return_exceptions=True)
        return time.monotonic() - begun

    async def drop(self, overlays: Sequence[ChainLayer]) -> None:
        """Take back prepared overlays that were not switched to. Idempotent.

        :raise FailedError: QEMU_FAILED, when one is in use.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        nodes = await self.nodes()
        for overlay in overlays:
            if overlay.node in nodes:
                await self._delete(overlay)
        await self._remove_descriptors(
            {opaque(mode, overlay) for overlay in overlays for mode in (WRITE, READ)},
            await self._labels(),
        )

    async def tidy(self) -> None:
        """Take away writing descriptors of layers that are not active any more, and all of those
        that are not there any more.

        QEMU closes descriptors only while the guest runs, so what is done under a paused guest
        leaves them open until this is called after `cont`. Cheap where there is nothing to do.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        nodes, labels = await self._look()
        await self._remove_descriptors(
            [label for label in labels if _is_over(label, nodes)], labels
        )

    async def forget(self, labels: Iterable[str]) -> None:
        """Take away the descriptors with these labels; those that are not there are passed over.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        await self._remove_descriptors(labels, await self._labels())

    async def flush(self) -> None:
        """Write everything that QEMU holds for its disks to the host's disk.

        :raise FailedError: QEMU_FAILED, when the host's disk refuses.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        for node in (await self.active_layers()).values():
            await flush_node(self._monitor, node)

    async def _give(self, overlay: ChainLayer) -> dict[str, object]:
        """Hand over an overlay's descriptors; the node that they are for."""
        number: int | None = None
        with contextlib.ExitStack() as opened:
            for mode, descriptor in await asyncio.to_thread(_open_both, overlay, opened):
                label = opaque(mode, overlay)
                number = await self._monitor.add_descriptor(descriptor, label, number)
        return layer_node(overlay, f"/dev/fdset/{number}", read_only=False, backing=None)

    async def _add(self, node: Mapping[str, object]) -> None:
        await self._monitor.execute("blockdev-add", node, seconds=BLOCK_SECONDS)

    async def _look(self) -> tuple[dict[str, bool], dict[str, tuple[int, int]]]:
        """All `nodes`, and all descriptors as `_labels` has them."""
        return await asyncio.gather(self.nodes(), self._labels())

    async def _confirm_sealed(
        self,
        layers: Sequence[ChainLayer],
        nodes: Mapping[str, bool],
        labels: Mapping[str, tuple[int, int]],
    ) -> None:
        for layer in layers:
            if not (nodes.get(layer.node) and nodes.get(layer.file_node)):
                # The switch itself ignores a failed reopen.
                raise InternalError(f"QEMU kept layer {layer.id} writable under its new overlay")
        await self._remove_descriptors({opaque(WRITE, layer) for layer in layers}, labels)

    async def _delete(self, overlay: ChainLayer) -> None:
        try:
            await self._monitor.execute("blockdev-del", {"node-name": overlay.node})
        except ReplyLostError as lost:
            await self._monitor.settle(lost)
            if overlay.node in await self.nodes():
                await self._monitor.execute("blockdev-del", {"node-name": overlay.node})

    async def _labels(self) -> dict[str, tuple[int, int]]:
        """Label of each descriptor that QEMU was given → its set and number."""
        labels = {}
        for each in _mappings(await self._ask("query-fdsets")):
            for descriptor in _mappings(each.get("fds")):
                place = (_number(each.get("fdset-id")), _number(descriptor.get("fd")))
                labels[str(descriptor.get("opaque"))] = place
        return labels

    async def _remove_descriptors(
        self, labels: Iterable[str], present: Mapping[str, tuple[int, int]]
    ) -> None:
        for label in labels:
            if label in present:
                number, descriptor = present[label]
                try:
                    await self._monitor.execute("remove-fd", {"fdset-id": number, "fd": descriptor})
                except FailedError:
                    # One that was removed under a paused guest went with its set's first now.
                    if label in await self._labels():
                        raise

    async def _ask(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        return await self._monitor.execute(command, arguments, repeatable=True)


async def flush_node(monitor: Monitor, node: str) -> None:
    """Write everything that QEMU holds for a node to the host's disk.

    :raise FailedError: QEMU_FAILED, when the host's disk refuses.
    :raise UnavailableError: MONITOR_UNAVAILABLE.
    """
    answer = await monitor.execute(
        "human-monitor-command",
        {"command-line": f"qemu-io {node} flush"},
        repeatable=True,
        seconds=BLOCK_SECONDS,
    )
    if answer:  # this command knows no errors, only text
        raise FailedError(f"A disk cannot be flushed: {answer}", reason="QEMU_FAILED")


def _open_both(layer: ChainLayer, opened: contextlib.ExitStack) -> list[tuple[str, int]]:
    """A layer's descriptors by their modes; `opened` closes them."""
    descriptors = []
    for mode, flags in ((WRITE, os.O_RDWR), (READ, os.O_RDONLY)):
        descriptor = _open(layer, flags)
        opened.callback(os.close, descriptor)
        descriptors.append((mode, descriptor))
    return descriptors


def _open(layer: ChainLayer, flags: int) -> int:
    try:
        return os.open(layer.path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise CorruptError(
            f"{layer.path} is missing from the store.", reason="LAYER_MISSING", path=layer.path
        ) from error
    except OSError as error:
        raise FailedError(
            f"{layer.path} cannot be opened: {error.strerror}.", reason="QEMU_FAILED"
        ) from error


def _is_over(label: str, nodes: Mapping[str, bool]) -> bool:
    """Whether a layer's descriptor has served; `nodes` are as ``BlockGraph.nodes`` has them."""
    mode, _, node = label.partition(":")
    return (mode == WRITE and nodes.get(node, True)) or (mode == READ and node not in nodes)


def _mappings(value: object) -> list[Mapping[str, object]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def _number(value: object) -> int:
    return value if isinstance(value, int) else -1
