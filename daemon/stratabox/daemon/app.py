"""The composition root: puts the daemon's parts together, runs it, and takes it apart."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stratabox.daemon.access.certificates import Certificates
from stratabox.daemon.access.credentials import Credentials
from stratabox.daemon.access.gate import Gate
from stratabox.daemon.access.links import Links
from stratabox.daemon.access.opening import certificates_of, opened
from stratabox.daemon.api.console import ConsoleServicer
from stratabox.daemon.api.events import EventsServicer
from stratabox.daemon.api.exec import ExecServicer
from stratabox.daemon.api.files import FilesServicer
from stratabox.daemon.api.host import HostServicer
from stratabox.daemon.api.images import ImagesServicer
from stratabox.daemon.api.jobs import JobsServicer
from stratabox.daemon.api.metrics import MetricsServicer
from stratabox.daemon.api.ports import PortsServicer
from stratabox.daemon.api.sandboxes import SandboxesServicer
from stratabox.daemon.api.server import Server
from stratabox.daemon.api.snapshots import SnapshotsServicer
from stratabox.daemon.api.ssh import SshServicer
from stratabox.daemon.api.transfers import TransfersServicer
from stratabox.daemon.api.volumes import VolumesServicer
from stratabox.daemon.api.workspaces import WorkspacesServicer
from stratabox.daemon.config import Config
from stratabox.daemon.config.admission_keys import SwapWish
from stratabox.daemon.config.keys import ConfinementWish, LauncherName
from stratabox.daemon.config.kinds import TcpAddress, UnixAddress
from stratabox.daemon.hypervisor import accelerator, confinement, qemu_host
from stratabox.daemon.hypervisor.confinement import PLAIN
from stratabox.daemon.hypervisor.housing import Housing
from stratabox.daemon.hypervisor.libvirt import walls
from stratabox.daemon.hypervisor.libvirt.launcher import LibvirtLauncher
from stratabox.daemon.hypervisor.machine import Launcher
from stratabox.daemon.hypervisor.qemu import QemuLauncher
from stratabox.daemon.lifecycle.account import Limits
from stratabox.daemon.lifecycle.admission import Admission
from stratabox.daemon.lifecycle.chains.jobs import Jobs
from stratabox.daemon.lifecycle.chains.opening import Opening
from stratabox.daemon.lifecycle.clones import Clones
from stratabox.daemon.lifecycle.common.once import Flights
from stratabox.daemon.lifecycle.common.threads import in_thread, together
from stratabox.daemon.lifecycle.images import Images
from stratabox.daemon.lifecycle.inside.callers import Callers
from stratabox.daemon.lifecycle.inside.commands import Commands
from stratabox.daemon.lifecycle.inside.file_watch import Watches
from stratabox.daemon.lifecycle.inside.files import Files
from stratabox.daemon.lifecycle.inside.ports import Ports
from stratabox.daemon.lifecycle.inside.previews import Previews
from stratabox.daemon.lifecycle.inside.processes import Processes
from stratabox.daemon.lifecycle.inside.visits import Visits
from stratabox.daemon.lifecycle.memory import merging, sparing, warming
from stratabox.daemon.lifecycle.memory.memories import Memories
from stratabox.daemon.lifecycle.memory.spares import Spares
from stratabox.daemon.lifecycle.observing.chronicle import Chronicle
from stratabox.daemon.lifecycle.observing.history import History
from stratabox.daemon.lifecycle.observing.metrics import Meter
from stratabox.daemon.lifecycle.reverts import Reverts
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.sandboxes import Sandboxes
from stratabox.daemon.lifecycle.snapshots import Snapshots
from stratabox.daemon.lifecycle.transfers.exports import Exports
from stratabox.daemon.lifecycle.transfers.imports import Imports
from stratabox.daemon.lifecycle.upkeep import backups, clockwatch, full_disk, sizes
from stratabox.daemon.lifecycle.upkeep.expiry import Expiry
from stratabox.daemon.lifecycle.upkeep.reconcile import Reconcile
from stratabox.daemon.lifecycle.volumes.volumes import Volumes
from stratabox.daemon.lifecycle.workspaces import Workspaces
from stratabox.daemon.lifecycle.world import World
from stratabox.daemon.locking import locked
from stratabox.daemon.service.activation import inherited
from stratabox.daemon.service.housing import choose as choose_housing
from stratabox.daemon.service.notifying import Notifier
from stratabox.daemon.tenki.parts import Parts
from stratabox.daemon.tenki.serving import tenki_services
from stratabox.storage import failpoints
from stratabox.storage.catalog import keys, secrets
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.files import reserve
from stratabox.storage.files.backups import open_catalog
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.store import Store
from stratabox.storage.model.errors import InvalidArgumentError, NoSpaceError
from stratabox.storage.model.records import MIB

if TYPE_CHECKING:
    from stratabox.daemon.previews.door import Door
    from stratabox.daemon.prometheus.figures import Figures
    from stratabox.daemon.rest.server import HttpServer

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that calls under way get when the daemon is told to end."""
FILES = 65_536
"""Files that the daemon may have open, where the host allows it."""


async def serve(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT; its guests run on.

    :raise DeniedError: STATE_DIR_IN_USE, when another daemon has the state folder.
    :raise StrataboxError: when something that it needs is missing or damaged.
    """

    _arm_failpoints()
    _raise_limit_of_files()
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    loop.add_signal_handler(signal.SIGUSR1, _log_tasks)
    notifier = Notifier(os.environ)
    handed = inherited(os.environ)
    certificates = certificates_of(config)
    loop.add_signal_handler(signal.SIGHUP, _reload, certificates)
    async with (
        running(config, certificates, handed),
        _in_background("watchdog", notifier.live()),
    ):
        notifier.tell("READY=1", f"STATUS=serving on {config.address}")
        await ending.wait()
        log.info("ending; guests run on")
        notifier.tell("STOPPING=1")


@asynccontextmanager
async def running(
    config: Config,
    certificates: Certificates | None = None,
    handed: Mapping[Path, socket.socket] = MappingProxyType({}),
) -> AsyncIterator[World]:
    """The daemon, serving; taken apart at the end of the context.

    :param handed: listening Unix sockets that it was given; closed at the end.
    """
    async with AsyncExitStack() as stack:
        for given in handed.values():
            stack.callback(given.close)
        store = Store(Layout(config.state_dir))
        stack.enter_context(locked(store.layout))
        catalog = _open_catalog(store.layout)
        stack.callback(catalog.close)
        world = await _world(config, catalog, store)
        stack.callback(world.worker.shutdown)
        stack.callback(world.memories.close)
        await stack.enter_async_context(_in_background("groups", world.housing.keep()))
        if isinstance(world.launcher, LibvirtLauncher):
            await stack.enter_async_context(_in_background("libvirt", world.launcher.keep()))
        chronicle = Chronicle(world.bus)
        guests = Guests(world)
        world.admission.know(guests.processes)
        flights = Flights(world.tasks)
        sandboxes = Sandboxes(world, guests, flights)
        snapshots = Snapshots(world, guests, flights)
        images = Images(world)
        volumes = Volumes(world, guests, flights)
        clones = Clones(world, guests, flights, sandboxes, snapshots)
        reverts = Reverts(world, guests, snapshots)
        stack.push_async_callback(world.spares.end_all)  # one may have been given back to the end
        # Work under way is finished before what it needs goes; guests are let go, not ended.
        stack.push_async_callback(world.tasks.finish)
        stack.callback(guests.let_go)
        stack.push_async_callback(world.tasks.finish)
        ports = Ports(world, guests)
        stack.push_async_callback(ports.close_all)
        await Reconcile(world, guests, sandboxes, images, clones, reverts).run()
        await sizes.fill(world)
        await ports.recover()
        # What is there now stays: the collector, which stops everything, need not look at it again.
        gc.collect()
        gc.freeze()
        jobs = Jobs(world, guests)
        await jobs.recover()
        for name, keeping in (
            ("jobs", jobs.keep()),
            ("warming", warming.keep(world)),
            ("sparing", sparing.keep(world)),
            ("merging", merging.keep(world)),
            ("backups", backups.keep(world)),
            ("ports", ports.keep()),
        ):
            await stack.enter_async_context(_in_background(name, keeping))
        files = Files(guests)
        callers = Callers(world=world, guests=guests)
        credentials = Credentials(await world.write(lambda tx: secrets.get(tx, secrets.SESSIONS)))
        gate = await stack.enter_async_context(
            opened(
                config,
                store.layout,
                lambda uses: world.write(lambda tx: keys.note_uses(tx, uses)),
                credentials,
            )
        )
        commands = Commands(guests)
        exports = Exports(world)
        visits, links = Visits(world, guests), Links()
        history = History(guests)
        tenki = Parts(
            world=world,
            guests=guests,
            sandboxes=sandboxes,
            snapshots=snapshots,
            volumes=volumes,
            clones=clones,
            commands=commands,
            files=files,
            callers=callers,
            history=history,
            credentials=credentials,
            previews=Previews(world, visits),
            links=links,
        )
        server = Server(
            config,
            gate=gate,
            certificates=certificates,
            commands=ExecServicer(commands=commands, processes=Processes(commands)),
            files=FilesServicer(files=files, watches=Watches(files)),
            sandboxes=SandboxesServicer(
                world=world, guests=guests, sandboxes=sandboxes, clones=clones, reverts=reverts
            ),
            snapshots=SnapshotsServicer(
                world=world, sandboxes=sandboxes, snapshots=snapshots, jobs=jobs
            ),
            jobs=JobsServicer(world=world, jobs=jobs),
            images=ImagesServicer(world=world, images=images),
            host=HostServicer(world=world, guests=guests),
            ports=PortsServicer(ports=ports, callers=callers),
            ssh=SshServicer(callers=callers),
            events=EventsServicer(chronicle=chronicle),
            volumes=VolumesServicer(world=world, guests=guests, volumes=volumes),
            console=ConsoleServicer(world=world, guests=guests),
            metrics=MetricsServicer(world=world, meter=Meter(world, guests)),
            workspaces=WorkspacesServicer(workspaces=Workspaces(world=world, guests=guests)),
            activated=_activated(config, handed),
            transfers=TransfersServicer(
                world=world, exports=exports, imports=Imports(world, images)
            ),
            others=[tenki_services(tenki)],
        )
        stops: list[Callable[[], Awaitable[None]]] = [partial(server.stop, GRACE)]
        await server.start()
        stack.push_async_callback(together, stops)  # whose calls have the same time to end
        if config.rest:
            rest = _rest(config, world, guests, sandboxes, snapshots, clones, gate, certificates)
            stops.append(rest.stop)
            await rest.start()
        if config.previews:
            door = _door(config.previews, world, visits, exports, links, certificates)
            stops.append(door.stop)
            await door.start()
        if config.metrics:
            shown, figures = _metrics(config, world, gate, certificates)
            stops.append(shown.stop)
            await shown.start()
            following = figures.follow(world.bus)
            await stack.enter_async_context(_in_background("figures", following))
        stack.callback(world.bus.end)
        for name, keeping in (
            ("expiry", Expiry(world, guests, sandboxes, snapshots).run()),
            ("gate", gate.keep()),
            ("history", history.keep()),
            ("full disk", full_disk.keep(world, guests)),
            ("clock", clockwatch.run(guests, offset=clockwatch.real_over_monotonic)),
        ):
            await stack.enter_async_context(_in_background(name, keeping))
        yield world


@asynccontextmanager
async def _in_background(name: str, work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Work that goes on until the context ends, which waits until it has come to its end."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_log_end)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("%s ended", task.get_name(), exc_info=error)


def _rest(
    config: Config,
    world: World,
    guests: Guests,
    sandboxes: Sandboxes,
    snapshots: Snapshots,
    clones: Clones,
    gate: Gate,
    certificates: Certificates | None,
) -> HttpServer:
    # Here: who does not serve it need not wait until all that it takes is imported.
    from stratabox.daemon.rest.app import Application
    from stratabox.daemon.rest.guard import Guard
    from stratabox.daemon.rest.sandboxes import SandboxCalls
    from stratabox.daemon.rest.server import HttpServer
    from stratabox.daemon.rest.snapshots import SnapshotCalls

    application = Application(
        SandboxCalls(
            world=world, guests=guests, sandboxes=sandboxes, snapshots=snapshots, clones=clones
        ),
        SnapshotCalls(world=world, sandboxes=sandboxes, snapshots=snapshots),
    )
    return HttpServer(
        "REST",
        config,
        config.rest,
        lambda address: Guard(application, gate, local=isinstance(address, UnixAddress)),
        certificates=certificates,
    )


def _metrics(
    config: Config, world: World, gate: Gate, certificates: Certificates | None
) -> tuple[HttpServer, Figures]:
    # Here, as above.
    from stratabox.daemon.prometheus.figures import Figures
    from stratabox.daemon.prometheus.serving import Exposition
    from stratabox.daemon.rest.server import HttpServer

    figures = Figures(world, gate)
    server = HttpServer(
        "metrics",
        config,
        config.metrics,
        lambda address: Exposition(figures, gate, address),
        certificates=certificates,
    )
    return server, figures


def _door(
    address: TcpAddress,
    world: World,
    visits: Visits,
    exports: Exports,
    links: Links,
    certificates: Certificates | None,
) -> Door:
    # Here, as above.
    from stratabox.daemon.previews.door import Door
    from stratabox.daemon.previews.downloads import Downloads

    return Door(address, visits, Downloads(world, exports, links), certificates)


async def _world(config: Config, catalog: Catalog, store: Store) -> World:
    qemu = await qemu_host.probe(config.qemu_binary)
    chosen = await accelerator.choose(config.accel)
    if chosen.name == "tcg" and config.accel != "tcg":
        log.warning("guests run without hardware virtualisation: %s", chosen.reason)
    firmware = {
        name: await in_thread(store.put_blob, path) for name, path in qemu.firmware_sources.items()
    }
    opening = Opening()
    housing = await choose_housing(config, os.environ, catalog.store_id)
    return World(
        config=config,
        catalog=catalog,
        store=store,
        launcher=await _launcher(config, catalog, store.layout, qemu, housing),
        housing=housing,
        qemu=qemu,
        accelerator=chosen,
        firmware=firmware,
        qemu_uids=os.geteuid() == 0,
        memories=Memories(store.layout, qemu, chosen, config.memory_cache),
        admission=Admission(_limits(config)),
        spares=Spares(config.warm_spares, opening),
        opening=opening,
    )


def _limits(config: Config) -> Limits:
    return Limits(
        memory=config.admission_memory // MIB,
        memory_overcommit=config.admission_memory_overcommit,
        memory_reserve=config.admission_memory_reserve // MIB,
        swap=config.admission_swap is SwapWish.COUNT,
        cpu_overcommit=config.admission_cpu_overcommit,
        sandboxes=config.admission_sandboxes,
    )


async def _launcher(
    config: Config,
    catalog: Catalog,
    layout: Layout,
    qemu: qemu_host.QemuHost,
    housing: Housing,
) -> Launcher:
    match config.launcher:
        case LauncherName.QEMU:
            confined = PLAIN
            if config.confinement is not ConfinementWish.OFF:
                required = config.confinement is ConfinementWish.REQUIRED
                confined = await confinement.choose(qemu.path, required=required)
            return QemuLauncher(qemu, catalog.store_id, layout.sandbox, confined, housing)
        case LauncherName.LIBVIRT:
            required = config.confinement is ConfinementWish.REQUIRED
            wish = PLAIN
            if config.confinement is not ConfinementWish.OFF:
                wish = await walls.choose(qemu.path, required=required)
            return LibvirtLauncher(
                qemu,
                catalog.store_id,
                layout.sandbox,
                uri=config.libvirt_uri,
                emulator_folder=config.libvirt_folder,
                wish=wish,
                required=required,
            )


def _activated(config: Config, handed: Mapping[Path, socket.socket]) -> socket.socket | None:
    """The API's Unix socket among those that were handed over."""
    address = config.address
    found = handed.get(address.path) if isinstance(address, UnixAddress) else None
    for path, given in handed.items():
        if given is not found:
            log.warning(
                "%s was handed over, and nothing listens there: address is %s", path, address
            )
    return found


def _open_catalog(layout: Layout) -> Catalog:
    while True:
        try:
            return open_catalog(layout)
        except NoSpaceError:
            if not reserve.release(layout.reserve):
                raise
            log.warning("the disk is full: some of its reserve is given up")


def _reload(certificates: Certificates | None) -> None:
    """SIGHUP: what can change while the daemon runs is read again."""
    if certificates is None:
        log.info("SIGHUP: there is no certificate to read again; other settings take a restart")
        return
    threading.Thread(target=certificates.reload, name="certificates", daemon=True).start()


def _log_tasks() -> None:
    """For whoever wonders what the daemon is doing: SIGUSR1 has it say so."""
    names = sorted(task.get_name() for task in asyncio.all_tasks())
    log.info("%d tasks: %s", len(names), ", ".join(names))


def _raise_limit_of_files() -> None:
    """Chains of saved memory are opened whole, and each guest takes some descriptors too.

    Not to infinity: some programs that are started from here try to close all that there could be.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _arm_failpoints() -> None:
    try:
        failpoints.arm(os.environ.get(failpoints.ENVIRONMENT, ""))
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from error
