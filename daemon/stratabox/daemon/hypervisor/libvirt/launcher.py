"""Starts and stops domains through libvirt; implements `machine.Launcher`.

libvirt is asked to start one, and nothing else: a running domain is a QEMU like any other. It is
found, controlled and ended as that, also while libvirtd is away; libvirt sees its monitor close and
cleans up by itself.
"""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import resource
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stratabox.daemon.hypervisor import command_line, confinement, launching, process, sockets
from stratabox.daemon.hypervisor.launch_files import InheritedFiles
from stratabox.daemon.hypervisor.libvirt import domain_xml, emulator, handover, walls
from stratabox.daemon.hypervisor.libvirt.connection import Connection, load_module
from stratabox.daemon.hypervisor.machine import DomainHandle, DomainSpec
from stratabox.daemon.hypervisor.qemu_host import QemuHost
from stratabox.storage.model.errors import (
    FailedError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.ids import SandboxId

CREATE_SECONDS = 180.0
"""libvirtd asks QEMU for its abilities before it starts one: 80 s where /dev/kvm hangs."""
RECONNECT_SECONDS = 2.0
_ABANDON_SECONDS = 30.0
_REMOVAL_SECONDS, _REMOVAL_PAUSE = 15.0, 0.02

log = logging.getLogger(__name__)


class LibvirtLauncher(launching.Processes):
    """Starts, stops, lists and finds domains of one store through libvirt.

    :param folder_of: the sandbox's own folder, where its sockets lie.
    :param uri: the connection, as "qemu:///system".
    :param emulator_folder: for the program that libvirt runs; QEMU's users must be able to enter.
    :param wish: what each QEMU is to be confined by; `walls.choose`, or none.
    :param required: one that cannot have all of that is not started.

    Making one forbids core dumps to this whole process and its children.
    """

    name = "libvirt"

    def __init__(
        self,
        host: QemuHost,
        store_id: str,
        folder_of: Callable[[SandboxId], Path],
        *,
        uri: str,
        emulator_folder: Path,
        wish: confinement.Confinement = confinement.PLAIN,
        required: bool = False,
    ) -> None:
        super().__init__(store_id, folder_of)
        self._host = host
        self._uri = uri
        self._emulator_folder = emulator_folder
        self._lost = asyncio.Event()
        self._connection = Connection(uri, on_lost=self._note_loss, on_lifecycle=self._hear)
        self._drivers: frozenset[str] | None = None
        self._swept = False
        self._wish = wish
        self._required = required
        self._found: walls.Found | None = None
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    async def start(self, spec: DomainSpec) -> DomainHandle:
        """Start a domain with its vCPUs stopped; both its monitors have greeted on return.

        If this raises or is cancelled, no process and no socket is left.

        :raise FailedError: QEMU_FAILED, when QEMU does not come up, with its own words;
            LIBVIRT_REFUSED, when libvirt does not start it, with libvirt's, or can't.
        :raise UnavailableError: LIBVIRT_UNAVAILABLE, when libvirtd does not answer.
        :raise DeniedError: TOOL_MISSING, when something that it takes is not installed;
            CONFINEMENT_UNAVAILABLE, when it cannot be confined as is required.
        :raise CorruptError: LAYER_MISSING, when a file of the store is not there.
        """
        program = await asyncio.to_thread(emulator.place, self._emulator_folder, self._host.path)
        if not self._swept:
            self._swept = True
            handover.sweep(program.parent, self._store_id)
        label = await self._label(spec)
        try:
            return await self._start(spec, program, label)
        except BaseException:
            sockets.remove(spec.folder)
            raise

    async def stop(self, handle: DomainHandle) -> None:
        """End a domain at once, as by pulling its plug, and wait until it is gone. Idempotent.

        libvirt lists it for a moment longer.

        :raise FailedError: QEMU_FAILED, when the kernel does not let go of it.
        """
        if handle.console is not None:
            handle.console.close()
        await process.kill(handle.pid, handle.started)
        sockets.remove(handle.folder)

    async def keep(self) -> None:
        """Be connected as long as this runs: so that what libvirt does to domains is told, and one
        that goes away is noticed. Ends only when cancelled, and hangs up then.
        """
        try:
            told = False
            while True:
                self._lost.clear()
                try:
                    await self._connection.call(lambda connection: connection.getLibVersion())
                except StrataboxError as error:
                    if not told:
                        log.warning("%s", error.message)
                    told = True
                    await asyncio.sleep(RECONNECT_SECONDS)
                    continue
                log.info("connected to libvirt at %s", self._uri)
                told = False
                await self._lost.wait()
                log.warning("libvirt at %s is gone; guests run on, and none can start", self._uri)
        finally:
            await self.close()

    async def close(self) -> None:
        """Hang up on libvirtd; domains run on."""
        await self._connection.close()

    async def _start(
        self, spec: DomainSpec, program: Path, label: domain_xml.Confinement
    ) -> DomainHandle:
        log_start = process.log_size(spec.folder)
        name = process.guest_name(self._store_id, spec.sandbox)
        with handover.Handover(program.parent, label.uid, self._store_id) as place:
            creating: asyncio.Task[None] | None = None
            handle: DomainHandle | None = None
            try:
                with (
                    InheritedFiles(spec, first=handover.FIRST) as files,
                    launching.open_log(spec.folder) as messages,
                ):
                    arguments = command_line.build(spec, name, files)
                    environment = launching.ENVIRONMENT | files.environment()
                    handle = DomainHandle(
                        sandbox=spec.sandbox,
                        pid=0,
                        started=0,
                        folder=spec.folder,
                        console=sockets.connect(spec.folder, sockets.CONSOLE),
                        incoming=files.state(),
                    )
                    xml = domain_xml.build(
                        spec,
                        name,
                        store_id=self._store_id,
                        emulator=program,
                        arguments=place.arguments,
                        confinement=label,
                    )
                    creating = asyncio.create_task(
                        self._connection.call(partial(_create, xml=xml), CREATE_SECONDS),
                        name=f"libvirt starts {spec.sandbox}",
                    )
                    giving = place.give(
                        arguments,
                        environment,
                        [*files.descriptors, messages],
                        walls.options(
                            self._wish,
                            reopened=files.reopened(),
                            kvm=spec.machine.accelerator == "kvm",
                            own_uid=spec.uid is not None,
                        ),
                        partial(self._judge, own_uid=spec.uid is not None),
                    )
                    await _given(giving, creating)
                assert place.pid is not None
                handle = replace(handle, pid=place.pid, started=place.started)
                try:
                    # libvirt asks it this and that over its own monitor and then believes that it
                    # is paused: before that is over, nobody may let it run.
                    await asyncio.gather(launching.wait_greeting(handle, log_start), creating)
                except (FailedError, UnavailableError) as error:
                    if self.is_alive(handle):
                        raise
                    raise launching.early_end(handle, log_start) from error
            except BaseException:
                await asyncio.shield(
                    asyncio.ensure_future(_abandon(place, creating, handle, spec.folder))
                )
                raise
        return handle

    def _judge(self, line: str, *, own_uid: bool) -> None:
        found = walls.judge(line, confinement.landlock_version(), own_uid=own_uid)
        if self._wish.walls is confinement.Walls.PLAIN:
            found = replace(found, why=self._wish.why)
        if self._required and found.why:
            raise confinement.denied(found.why)
        if found != self._found:
            self._found = found
            if found.why:
                confinement.warn(found.walls, found.why)

    async def _label(self, spec: DomainSpec) -> domain_xml.Confinement:
        if self._drivers is None:
            self._drivers = await self._connection.call(_security_drivers, CREATE_SECONDS)
        uid = os.geteuid() if spec.uid is None else spec.uid
        gid = os.getegid() if spec.uid is None else spec.uid
        if spec.uid is not None and spec.machine.accelerator == "kvm":
            gid = _group_of_kvm(gid)
        return domain_xml.Confinement(uid=uid, gid=gid, drivers=self._drivers)

    def _note_loss(self) -> None:
        self._drivers = None  # it may come back with others
        self._lost.set()

    def _hear(self, uuid: str, event: int, detail: int) -> None:
        module = load_module()
        if event == module.VIR_DOMAIN_EVENT_STOPPED:
            why = {
                module.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: "destroyed through libvirt",
                module.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: "it shut down",
                module.VIR_DOMAIN_EVENT_STOPPED_FAILED: "its QEMU ended",
            }.get(detail, f"libvirt's reason {detail}")
            log.info("libvirt: domain %s is over: %s", uuid, why)


async def _given(giving: Any, creating: asyncio.Task[None]) -> None:
    """Wait until the emulator has all; or libvirt's error, when it ran none."""
    task = asyncio.create_task(giving)
    try:
        await asyncio.wait((task, creating), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await creating
            raise FailedError(
                "libvirt says that it started the domain, and nothing asked for its files.",
                reason="LIBVIRT_REFUSED",
            )
        if isinstance(task.exception(), FailedError):
            await creating  # which knows better why
        await task
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def _abandon(
    place: handover.Handover,
    creating: asyncio.Task[None] | None,
    handle: DomainHandle | None,
    folder: Path,
) -> None:
    # An emulator that comes now is refused, and ends.
    place.close()
    if handle is not None and handle.console is not None:
        handle.console.close()
    if place.pid is not None:
        await process.kill(place.pid, place.started)
    if creating is not None:
        # What is under way in libvirtd can't be cancelled, and ends as its QEMU is gone.
        await asyncio.wait((creating,), timeout=_ABANDON_SECONDS)
        creating.cancel()
        await asyncio.wait((creating,))
    sockets.remove(folder)


def _create(connection: Any, xml: str) -> None:
    module = load_module()
    try:
        # It was killed a moment ago, and libvirt has not cleaned up yet.
        connection.lookupByUUIDString(ET.fromstring(xml).findtext("uuid")).destroy()
    except module.libvirtError as error:
        if error.get_error_code() not in (
            module.VIR_ERR_NO_DOMAIN,
            module.VIR_ERR_OPERATION_INVALID,
        ):
            raise
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while True:
        try:
            connection.createXML(xml, module.VIR_DOMAIN_START_PAUSED)
        except module.libvirtError as error:
            # What it still removes it does not find any more either (virDomainObjListFindByUUID),
            # and tells nobody when that is done.
            if not _is_removed_just_now(error, module) or time.monotonic() > deadline:
                raise
            time.sleep(_REMOVAL_PAUSE)
        else:
            return


def _is_removed_just_now(error: Any, module: Any) -> bool:
    """Whether the domain's last run is what stands in its way (virDomainObjListAddLocked)."""
    failed: bool = error.get_error_code() == module.VIR_ERR_OPERATION_FAILED
    return failed and "already being removed" in str(error)


def _security_drivers(connection: Any) -> frozenset[str]:
    host = ET.fromstring(connection.getCapabilities()).iterfind("host/secmodel/model")
    return frozenset(model.text or "" for model in host)


def _group_of_kvm(otherwise: int) -> int:
    """The group that may open /dev/kvm: libvirt gives QEMU no further groups."""
    try:
        return grp.getgrnam("kvm").gr_gid
    except KeyError:
        return otherwise
