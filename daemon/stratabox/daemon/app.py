"""The composition root: puts the daemon's parts together, runs it, and takes it apart."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from stratabox.daemon.api.host import HostServicer
from stratabox.daemon.api.images import ImagesServicer
from stratabox.daemon.api.sandboxes import SandboxesServicer
from stratabox.daemon.api.server import Server
from stratabox.daemon.api.snapshots import SnapshotsServicer
from stratabox.daemon.config import Config
from stratabox.daemon.config.keys import LauncherName
from stratabox.daemon.hypervisor import accelerator, qemu_host
from stratabox.daemon.hypervisor.machine import Launcher
from stratabox.daemon.hypervisor.qemu import QemuLauncher
from stratabox.daemon.lifecycle import expiry
from stratabox.daemon.lifecycle.clones import Clones
from stratabox.daemon.lifecycle.guests import Guests
from stratabox.daemon.lifecycle.images import Images
from stratabox.daemon.lifecycle.memories import Memories
from stratabox.daemon.lifecycle.once import Flights
from stratabox.daemon.lifecycle.reconcile import Reconcile
from stratabox.daemon.lifecycle.reverts import Reverts
from stratabox.daemon.lifecycle.sandboxes import Sandboxes
from stratabox.daemon.lifecycle.snapshots import Snapshots
from stratabox.daemon.lifecycle.threads import in_thread
from stratabox.daemon.lifecycle.world import World
from stratabox.storage import failpoints
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.store import Store
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that calls under way get when the daemon is told to end."""


async def serve(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT; its guests run on.

    :raise DeniedError: STATE_DIR_IN_USE, when another daemon has the state folder.
    :raise StrataboxError: when something that it needs is missing or damaged.
    """

    _arm_failpoints()
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    loop.add_signal_handler(signal.SIGUSR1, _log_tasks)
    async with running(config):
        await ending.wait()
        log.info("ending; guests run on")


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[World]:
    """The daemon, serving; taken apart at the end of the context."""
    async with AsyncExitStack() as stack:
        store = Store(Layout(config.state_dir))
        stack.enter_context(_locked(store.layout))
        catalog = Catalog(store.layout.catalog)
        stack.callback(catalog.close)
        world = await _world(config, catalog, store)
        stack.callback(world.worker.shutdown)
        stack.callback(world.memories.close)
        guests = Guests(world)
        flights = Flights(world.tasks)
        sandboxes = Sandboxes(world, guests, flights)
        snapshots = Snapshots(world, guests, flights)
        images = Images(world)
        clones = Clones(world, guests, flights, sandboxes, snapshots)
        reverts = Reverts(world, guests, snapshots)
        # Work under way is finished before what it needs goes; guests are let go, not ended.
        stack.push_async_callback(world.tasks.finish)
        stack.callback(guests.let_go)
        stack.push_async_callback(world.tasks.finish)
        await Reconcile(world, guests, sandboxes, images, clones, reverts).run()
        server = Server(
            config,
            sandboxes=SandboxesServicer(
                world=world, guests=guests, sandboxes=sandboxes, clones=clones, reverts=reverts
            ),
            snapshots=SnapshotsServicer(world=world, sandboxes=sandboxes, snapshots=snapshots),
            images=ImagesServicer(world=world, images=images),
            host=HostServicer(world=world),
        )
        await server.start()
        stack.push_async_callback(server.stop, GRACE)
        stack.callback(world.bus.end)
        expiring = asyncio.create_task(expiry.run(world, snapshots), name="expiry")
        stack.callback(expiring.cancel)
        yield world


async def _world(config: Config, catalog: Catalog, store: Store) -> World:
    qemu = await qemu_host.probe(config.qemu_binary)
    chosen = await accelerator.choose(config.accel)
    if chosen.name == "tcg" and config.accel != "tcg":
        log.warning("guests run without hardware virtualisation: %s", chosen.reason)
    firmware = {
        name: await in_thread(store.put_blob, path) for name, path in qemu.firmware_sources.items()
    }
    return World(
        config=config,
        catalog=catalog,
        store=store,
        launcher=_launcher(config, catalog, store.layout, qemu),
        qemu=qemu,
        accelerator=chosen,
        firmware=firmware,
        qemu_uids=os.geteuid() == 0,
        memories=Memories(store.layout, qemu, chosen, config.memory_cache),
    )


def _launcher(
    config: Config, catalog: Catalog, layout: Layout, qemu: qemu_host.QemuHost
) -> Launcher:
    match config.launcher:
        case LauncherName.QEMU:
            return QemuLauncher(qemu, catalog.store_id, layout.sandbox)
        case LauncherName.LIBVIRT:
            raise DeniedError(
                'launcher = "libvirt" cannot run sandboxes yet; use "qemu"',
                reason="LAUNCHER_UNSUPPORTED",
            )


@contextmanager
def _locked(layout: Layout) -> Iterator[None]:
    """Hold the state folder for this daemon alone.

    :raise DeniedError: STATE_DIR_IN_USE.
    """
    descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            raise DeniedError(
                f"another daemon (pid {holder or 'unknown'}) has the state folder {layout.root}:"
                " end it, or use another state_dir",
                reason="STATE_DIR_IN_USE",
                state_dir=layout.root,
                pid=holder,
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _log_tasks() -> None:
    """For whoever wonders what the daemon is doing: SIGUSR1 has it say so."""
    names = sorted(task.get_name() for task in asyncio.all_tasks())
    log.info("%d tasks: %s", len(names), ", ".join(names))


def _arm_failpoints() -> None:
    try:
        failpoints.arm(os.environ.get(failpoints.ENVIRONMENT, ""))
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from error
