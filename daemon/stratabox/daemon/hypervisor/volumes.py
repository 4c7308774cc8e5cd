"""The bus of volumes of a running domain: plug one in, grow it, take it out.

Target N of the bus is slot N. What is there is asked of QEMU and never remembered, so that what a
daemon left half-done before it died is found by the next one. QEMU takes a device out at once and
does not wait for its guest: to have the guest let go of it first is the caller's to see to.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Collection, Mapping, Sequence

from stratabox.daemon.hypervisor.block import BLOCK_SECONDS, flush_node
from stratabox.daemon.hypervisor.command_line import layer_node, stand_in_node, volume_device
from stratabox.daemon.hypervisor.launch_files import READ, WRITE, opaque
from stratabox.daemon.hypervisor.machine import ChainLayer, DomainVolume
from stratabox.daemon.hypervisor.monitor import Monitor
from stratabox.daemon.hypervisor.qmp import ReplyLostError
from stratabox.storage.model.errors import CorruptError, FailedError, StrataboxError

GONE_SECONDS = 30.0
"""How long QEMU may take to take a device out."""

_DEVICE = re.compile(r"vol(\d+)")
_POLL = 0.01


class VolumeBus:
    """The volumes of one running domain."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    async def present(self) -> dict[int, str]:
        """Slot of each volume that is plugged in → the node that its device begins with.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        return {
            slot: str(
                await self._ask(
                    "qom-get",
                    {"path": f"/machine/peripheral/vol{slot}", "property": "drive"},
                )
            )
            for slot in await self._slots()
        }

    async def plug(self, volume: DomainVolume) -> None:
        """Put a volume in an empty slot. When it fails, nothing of it is left.

        Layers that another volume has brought along are shared.

        :raise FailedError: QEMU_FAILED, when QEMU does not take it.
        :raise CorruptError: LAYER_MISSING, when a file is not there.
        :raise UnavailableError: MONITOR_UNAVAILABLE; then `unplug` before trying again.
        """
        known = await self._nodes()
        added: list[ChainLayer] = []
        try:
            backing: str | None = None
            for layer in reversed(volume.chain):
                if layer.node not in known:
                    added.insert(0, layer)
                    writable = layer is volume.chain[0] and not volume.read_only
                    await self._add(layer, backing, writable=writable)
                backing = layer.node
            if not volume.chain and volume.node not in known:
                await self._monitor.execute("blockdev-add", stand_in_node(volume))
            try:
                await self._monitor.execute("device_add", volume_device(volume))
            except ReplyLostError as lost:
                await self._monitor.settle(lost)
                if volume.slot not in await self._slots():
                    raise
        except StrataboxError as error:
            if isinstance(error, FailedError | CorruptError):
                await self._forget(added)
            raise

    async def unplug(
        self, slot: int, chain: Sequence[ChainLayer], keep: Collection[str] = ()
    ) -> None:
        """Take out what is in a slot, and let go of its files. An empty slot is fine.

        What the guest has not written by now is lost to it.

        :param chain: what it stands on, the top first; layers that are not there are passed over.
        :param keep: nodes that others of the domain stand on too.
        :raise FailedError: QEMU_FAILED.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        node = (await self.present()).get(slot)
        if node is not None:
            try:
                await self._monitor.execute("device_del", {"id": f"vol{slot}"})
            except ReplyLostError as lost:
                await self._monitor.settle(lost)
            await self._wait_gone(slot)
            # It leaves QEMU's tree a moment before it lets go of its disk.
            await self._delete_soon(node)
        await self._forget([layer for layer in chain if layer.node not in keep])

    async def resize(self, node: str, size: int) -> None:
        """Grow the disk behind a node to `size` bytes; the guest is told. Never smaller.

        :raise FailedError: QEMU_FAILED.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        await self._monitor.execute(
            "block_resize",
            {"node-name": node, "size": size},
            repeatable=True,
            seconds=BLOCK_SECONDS,
        )

    async def flush(self) -> None:
        """Write everything that QEMU holds for its volumes to the host's disk.

        :raise FailedError: QEMU_FAILED, when the host's disk refuses.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        for node in (await self.present()).values():
            await flush_node(self._monitor, node)

    async def _slots(self) -> list[int]:
        children = await self._ask("qom-list", {"path": "/machine/peripheral"})
        names = [str(child.get("name")) for child in _mappings(children)]
        return sorted(int(match[1]) for name in names if (match := _DEVICE.fullmatch(name)))

    async def _wait_gone(self, slot: int) -> None:
        try:
            async with asyncio.timeout(GONE_SECONDS):
                while True:
                    if slot not in await self._slots():
                        return
                    await asyncio.sleep(_POLL)  # its event may come before we listen
        except TimeoutError:
            raise FailedError(
                f"QEMU did not take volume {slot} out within {GONE_SECONDS:g} s.",
                reason="QEMU_FAILED",
            ) from None

    async def _delete_soon(self, node: str) -> None:
        deadline = asyncio.get_running_loop().time() + GONE_SECONDS
        while True:
            try:
                return await self._delete(node)
            except FailedError as error:
                if "in use" not in error.message or asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(_POLL)

    async def _add(self, layer: ChainLayer, backing: str | None, *, writable: bool) -> None:
        number: int | None = None
        modes = [(WRITE, os.O_RDWR)] if writable else []
        for mode, flags in (*modes, (READ, os.O_RDONLY)):
            descriptor = await asyncio.to_thread(_open, layer, flags)
            try:
                label = opaque(mode, layer)
                number = await self._monitor.add_descriptor(descriptor, label, number)
            finally:
                os.close(descriptor)
        node = layer_node(layer, f"/dev/fdset/{number}", read_only=not writable, backing=backing)
        await self._monitor.execute("blockdev-add", node, seconds=BLOCK_SECONDS)

    async def _forget(self, layers: Sequence[ChainLayer]) -> None:
        """Let go of layers, the top first; those that are not there are passed over."""
        known = await self._nodes()
        for layer in layers:
            if layer.node in known:
                await self._delete(layer.node)
        labels = {opaque(mode, layer) for layer in layers for mode in (WRITE, READ)}
        for each in _mappings(await self._ask("query-fdsets")):
            for descriptor in _mappings(each.get("fds")):
                if descriptor.get("opaque") in labels:
                    place = {"fdset-id": each.get("fdset-id"), "fd": descriptor.get("fd")}
                    await self._monitor.execute("remove-fd", place)

    async def _delete(self, node: str) -> None:
        try:
            await self._monitor.execute("blockdev-del", {"node-name": node}, seconds=BLOCK_SECONDS)
        except ReplyLostError as lost:
            await self._monitor.settle(lost)
            if node in await self._nodes():
                await self._monitor.execute("blockdev-del", {"node-name": node})

    async def _nodes(self) -> set[str]:
        answer = await self._ask("query-named-block-nodes", {"flat": True})
        return {str(node.get("node-name")) for node in _mappings(answer)}

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
