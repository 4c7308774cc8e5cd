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
import os
import re
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
                await self._prepare(overlay)
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
        try:
            await self._monitor.execute("transaction", {"actions": actions}, seconds=BLOCK_SECONDS)
        except ReplyLostError as lost:
            await self._monitor.settle(lost, BLOCK_SECONDS)
            active = set((await self.active_layers()).values())
            if not active >= {new.node for _, new in pairs}:
                raise FailedError(
                    "QEMU did not switch to the new overlays.", reason="QEMU_FAILED"
                ) from lost
        await self._confirm_sealed([old for old, _ in pairs])

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
            {opaque(mode, overlay) for overlay in overlays for mode in (WRITE, READ)}
        )

    async def tidy(self) -> None:
        """Take away writing descriptors of layers that are not active any more.

        QEMU closes descriptors only while the guest runs, so a switch under a paused guest leaves
        them open until this is called after `cont`. Cheap where there is nothing to do.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        writing = {label for label in await self._labels() if label.startswith(f"{WRITE}:")}
        if not writing:
            return
        nodes = await self.nodes()
        await self._remove_descriptors(
            {label for label in writing if nodes.get(label.partition(":")[2], True)}
        )

    async def flush(self) -> None:
        """Write everything that QEMU holds for its disks to the host's disk.

        :raise FailedError: QEMU_FAILED, when the host's disk refuses.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        for node in (await self.active_layers()).values():
            answer = await self._monitor.execute(
                "human-monitor-command",
                {"command-line": f"qemu-io {node} flush"},
                repeatable=True,
                seconds=BLOCK_SECONDS,
            )
            if answer:  # this command knows no errors, only text
                raise FailedError(f"A disk cannot be flushed: {answer}", reason="QEMU_FAILED")

    async def _prepare(self, overlay: ChainLayer) -> None:
        number: int | None = None
        for mode, flags in ((WRITE, os.O_RDWR), (READ, os.O_RDONLY)):
            descriptor = await asyncio.to_thread(_open, overlay, flags)
            try:
                label = opaque(mode, overlay)
                number = await self._monitor.add_descriptor(descriptor, label, number)
            finally:
                os.close(descriptor)
        node = layer_node(overlay, f"/dev/fdset/{number}", read_only=False, backing=None)
        await self._monitor.execute("blockdev-add", node, seconds=BLOCK_SECONDS)

    async def _confirm_sealed(self, layers: Sequence[ChainLayer]) -> None:
        nodes = await self.nodes()
        for layer in layers:
            if not (nodes.get(layer.node) and nodes.get(layer.file_node)):
                # The switch itself ignores a failed reopen.
                raise InternalError(f"QEMU kept layer {layer.id} writable under its new overlay")
        await self._remove_descriptors({opaque(WRITE, layer) for layer in layers})

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

    async def _remove_descriptors(self, labels: Iterable[str]) -> None:
        present = await self._labels()
        for label in labels:
            if label in present:
                number, descriptor = present[label]
                await self._monitor.execute("remove-fd", {"fdset-id": number, "fd": descriptor})

    async def _ask(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        return await self._monitor.execute(command, arguments, repeatable=True)


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


def _mappings(value: object) -> list[Mapping[str, object]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def _number(value: object) -> int:
    return value if isinstance(value, int) else -1
