"""The libvirt launcher, in its first form: QEMU as a transient libvirt domain.

libvirt starts, confines and lists; everything after the start goes over our own sockets, as with
the plain launcher. The only importer of libvirt, and only when it is used. libvirt's calls block,
so they run in threads.

In this form QEMU runs as the daemon's own user and opens the store's files by their paths, so the
sandbox's folder must be short enough for a socket's path (107 bytes).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stratabox.daemon.hypervisor import domain_xml, process, qmp, sockets
from stratabox.daemon.hypervisor.machine import DomainHandle, DomainSpec
from stratabox.daemon.hypervisor.qemu_host import QemuHost
from stratabox.storage.model.errors import DeniedError, FailedError, UnavailableError
from stratabox.storage.model.ids import SandboxId

START_SECONDS = 120.0
"""libvirtd asks QEMU for its abilities before it starts one: 80 s where /dev/kvm hangs."""


class LibvirtLauncher:
    """Starts, stops, lists and finds domains of one store through libvirt. Implements `Launcher`.

    :param uri: the connection, as "qemu:///system".
    :param folder_of: the sandbox's own folder, where its sockets lie.
    """

    name = "libvirt"

    def __init__(
        self,
        host: QemuHost,
        store_id: str,
        folder_of: Callable[[SandboxId], Path],
        uri: str = "qemu:///system",
    ) -> None:
        self._host = host
        self._store_id = store_id
        self._folder_of = folder_of
        self._uri = uri

    async def start(self, spec: DomainSpec) -> DomainHandle:
        """Start a domain with its vCPUs stopped; both its monitors have greeted on return.

        If this raises or is cancelled, no domain and no socket is left.

        :raise FailedError: QEMU_FAILED, when libvirt or QEMU refuses, in their words.
        :raise UnavailableError: LIBVIRT_UNAVAILABLE, when libvirtd does not answer.
        :raise DeniedError: TOOL_MISSING, when libvirt's Python module is not installed.
        """
        name = process.guest_name(self._store_id, spec.sandbox)
        xml = domain_xml.build(spec, name, emulator=self._host.path, uid=os.getuid())
        creating = asyncio.ensure_future(asyncio.to_thread(self._create, xml))
        try:
            await asyncio.shield(creating)
            handle = await self.find(spec.sandbox, spec.folder)
            if handle is None:
                raise FailedError(
                    "QEMU ended as soon as libvirt had started it.", reason="QEMU_FAILED"
                )
            await qmp.greet_all(spec.folder, START_SECONDS)
        except BaseException as error:
            await asyncio.shield(asyncio.ensure_future(self._abandon(creating, spec)))
            if isinstance(error, OSError):
                raise FailedError(
                    f"QEMU does not come up ({error}).", reason="QEMU_FAILED"
                ) from error
            raise
        return handle

    async def stop(self, handle: DomainHandle) -> None:
        """End a domain at once, as by pulling its plug, and wait until it is gone. Idempotent.

        :raise UnavailableError: LIBVIRT_UNAVAILABLE, when libvirtd does not answer.
        """
        await asyncio.to_thread(self._destroy, handle.sandbox)
        await process.kill(handle.pid, handle.started)
        sockets.remove(handle.folder)

    async def list(self) -> Sequence[DomainHandle]:
        """All domains of this store that run on this host, found as the processes that they are."""
        found = await asyncio.to_thread(process.find_all, self._store_id)
        return [
            DomainHandle(
                sandbox=each.sandbox,
                pid=each.pid,
                started=each.started,
                folder=self._folder_of(each.sandbox),
            )
            for each in found
        ]

    async def find(self, sandbox: SandboxId, folder: Path) -> DomainHandle | None:
        """The running domain of one sandbox, also one that an earlier daemon started."""
        for each in await asyncio.to_thread(process.find_all, self._store_id):
            if each.sandbox == sandbox:
                return DomainHandle(
                    sandbox=sandbox, pid=each.pid, started=each.started, folder=folder
                )
        return None

    def is_alive(self, handle: DomainHandle) -> bool:
        """Tell whether that very process still runs."""
        return process.start_time(handle.pid) == handle.started

    async def _abandon(self, creating: asyncio.Future[None], spec: DomainSpec) -> None:
        # A call into libvirt can't be cancelled: wait for what it makes, and unmake it.
        await asyncio.wait((creating,))
        if creating.exception() is None:
            await asyncio.to_thread(self._destroy, spec.sandbox)
        sockets.remove(spec.folder)

    def _create(self, xml: str) -> None:
        libvirt = _module()
        connection = self._connect(libvirt)
        try:
            connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
        except libvirt.libvirtError as error:
            raise FailedError(
                f"libvirt cannot start it: {process.printable(str(error))}", reason="QEMU_FAILED"
            ) from error
        finally:
            connection.close()

    def _destroy(self, sandbox: SandboxId) -> None:
        libvirt = _module()
        connection = self._connect(libvirt)
        try:
            connection.lookupByUUIDString(str(sandbox)).destroy()
        except libvirt.libvirtError as error:
            gone = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
            if error.get_error_code() not in gone:
                raise UnavailableError(
                    f"libvirt cannot end it: {error}", reason="LIBVIRT_UNAVAILABLE"
                ) from error
        finally:
            connection.close()

    def _connect(self, libvirt: Any) -> Any:
        try:
            return libvirt.open(self._uri)
        except libvirt.libvirtError as error:
            raise UnavailableError(
                f"libvirt does not answer at {self._uri}: {error}", reason="LIBVIRT_UNAVAILABLE"
            ) from error


def _module() -> Any:
    try:
        import libvirt
    except ImportError:
        raise DeniedError(
            "libvirt's Python module is not installed: pip install 'stratabox[libvirt]'.",
            reason="TOOL_MISSING",
            tool="libvirt-python",
        ) from None
    # By default libvirt prints each error on stderr besides raising it.
    libvirt.registerErrorHandler(lambda *_: None, None)
    return libvirt
