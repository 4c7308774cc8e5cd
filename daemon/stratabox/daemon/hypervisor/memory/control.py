"""What QEMU itself is asked and told about memory, over its monitor."""

from __future__ import annotations

from stratabox.daemon.hypervisor.monitor import Monitor
from stratabox.daemon.hypervisor.qmp import ReplyLostError
from stratabox.storage.model.errors import FailedError, UnavailableError

_SAVE_SECONDS = 60.0
_LABEL = "state"


class MemoryControl:
    """The memory side of one running domain."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    async def ram_file(self) -> tuple[str, int]:
        """The file that the guest's RAM is a mapping of, as QEMU calls it, and its size in bytes.

        :raise UnavailableError: MEMORY_UNREADABLE, for a QEMU that was started otherwise;
            MONITOR_UNAVAILABLE.
        """
        try:
            path = await self._property("mem-path")
        except FailedError as error:
            raise UnavailableError(
                "this guest was started by an older Stratabox, whose memory cannot be saved; stop "
                "and start it",
                reason="MEMORY_UNREADABLE",
            ) from error
        size = await self._property("size")
        return str(path), size if isinstance(size, int) else 0

    async def add_target(self, descriptor: int) -> int:
        """Give QEMU an empty file to save its devices' state into: the number of its set.

        :param descriptor: open for writing only; QEMU compares the modes.
        """
        return await self._monitor.add_descriptor(descriptor, _LABEL)

    async def save_devices(self, target: int) -> None:
        """Write the state of all devices but RAM; the vCPUs must be stopped.

        :raise FailedError: QEMU_FAILED, when a device cannot be saved.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        # Not live: else QEMU would give up its disks as if the guest had moved away.
        await self._monitor.execute(
            "xen-save-devices-state",
            {"filename": f"/dev/fdset/{target}", "live": False},
            seconds=_SAVE_SECONDS,
        )

    async def remove_target(self, target: int) -> None:
        """Take the file away again. QEMU closes it once the guest runs."""
        await self._monitor.execute("remove-fd", {"fdset-id": target})

    async def begin_load(self, source: str, *, wired: bool) -> None:
        """Have the devices take their saved state; how that goes tells `load_status`.

        A card that has its state announces itself at once. Its stream begins to listen when QEMU
        has nothing else to do, and until then is not marked as unconnected (net/stream.c,
        link_down): QEMU 7.2 ended by SIGSEGV there, in 1 of 650 restores on a busy host.
        So it is marked here; whoever connects takes the mark away. (Without announcements,
        announce-rounds=0, QEMU 7.2 ends by SIGSEGV when the guest reboots.)

        :param source: as for QMP's migrate-incoming.
        :param wired: the card has such a stream.
        :raise FailedError: QEMU_FAILED.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        if wired:
            await self._monitor.execute("set_link", {"name": "net", "up": False}, repeatable=True)
        await self._monitor.execute("migrate-incoming", {"uri": source})

    async def load_status(self) -> str:
        """How loading goes: "active", "completed", "failed", … or ""."""
        try:
            answer = await self._monitor.execute("query-migrate")
        except ReplyLostError:
            return ""
        return str(answer.get("status", "")) if isinstance(answer, dict) else ""

    async def _property(self, name: str) -> object:
        where = {"path": "/objects/ram", "property": name}
        return await self._monitor.execute("qom-get", where, repeatable=True)
