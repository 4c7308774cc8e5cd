"""Giving a sandbox a volume, and taking it back."""

from __future__ import annotations

import logging

from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.threads import settle
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.volumes import claims, settling
from stratabox.daemon.lifecycle.volumes.claims import Wish
from stratabox.daemon.lifecycle.volumes.settling import Running
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import (
    DeniedError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.ids import VolumeId
from stratabox.storage.model.records import Attachment, Sandbox
from stratabox.storage.model.states import AttachmentState, SandboxState

log = logging.getLogger(__name__)


async def attach(world: World, guest: Guest, wish: Wish) -> Sandbox:
    """Give a sandbox a volume: mounted on return where it runs, claimed where it is stopped.

    What it has already, in the same way, is fine. When this raises, it does not have it.

    :raise NotFoundError: VOLUME_NOT_FOUND.
    :raise DeniedError: VOLUME_IN_USE, VOLUME_NOT_READY, VOLUME_NOT_CLEAN, VOLUMES_UNSUPPORTED,
        INVALID_STATE.
    :raise InvalidArgumentError: INVALID_ARGUMENT, INVALID_RESOURCES.
    :raise FailedError: VOLUME_MOUNT_FAILED, VOLUME_GROW_FAILED, QEMU_FAILED.
    :raise UnavailableError: AGENT_UNAVAILABLE.
    """
    (wish,) = claims.check([wish])
    (wish,) = await world.read(lambda tx: claims.resolved(tx, [wish]))
    async with guest.lock:
        await guest.settle()
        sandbox = await guest.record()
        policy.require_state(
            sandbox, SandboxState.RUNNING, SandboxState.STOPPED, SandboxState.FAILED,
            action="attach a volume to",
        )  # fmt: skip
        running = _running(guest, world, sandbox) if sandbox.has_process else None
        attachment, clean = _present(sandbox, wish), False
        if attachment is None:
            state = AttachmentState.ATTACHING if running else AttachmentState.ATTACHED
            attachment, sandbox, clean = await _claim(world, sandbox, wish, state)
        elif attachment.state is AttachmentState.ATTACHED:
            return sandbox
        if running is None:
            return sandbox
        guest.has_volumes = True
        try:
            return await settling.bring(running, attachment)
        except BaseException:
            await settle(_undo(running, attachment, clean=clean))
            raise


async def detach(world: World, guest: Guest, reference: str, *, force: bool = False) -> Sandbox:
    """Take a volume from a sandbox. When this raises, the sandbox has it still.

    :param force: do not ask the guest: what it has not written is lost.
    :raise NotFoundError: VOLUME_NOT_FOUND.
    :raise DeniedError: VOLUME_NOT_ATTACHED, INVALID_STATE.
    :raise FailedError: VOLUME_BUSY, QEMU_FAILED.
    :raise UnavailableError: AGENT_UNAVAILABLE.
    """
    volume = await world.read(lambda tx: volumes.resolve(tx, reference))
    async with guest.lock:
        await guest.settle()
        sandbox = await guest.record()
        attachment = next((each for each in sandbox.volumes if each.volume == volume), None)
        if attachment is None:
            raise DeniedError(
                f"sandbox {sandbox.name!r} does not have volume {reference!r}",
                reason="VOLUME_NOT_ATTACHED",
                sandbox=sandbox.id,
                volume=volume,
            )
        policy.require_state(
            sandbox, SandboxState.RUNNING, SandboxState.STOPPED, SandboxState.FAILED,
            action="detach a volume from",
        )  # fmt: skip
        if not sandbox.has_process:
            return await settling.release(world, attachment, clean=False)
        running = _running(guest, world, sandbox, ready=not force)
        await settling.note(running, attachment, AttachmentState.DETACHING)
        hit("volume.detach-intended")
        try:
            return await settling.take(running, attachment, force=force)
        except (StrataboxError, OSError):
            if guest.domain is None or not world.launcher.is_alive(guest.domain.handle):
                # Its guest has ended meanwhile: nothing holds the volume any more.
                return await settling.release(world, attachment, clean=False)
            await settling.note(running, attachment, AttachmentState.ATTACHED)
            raise


def _running(guest: Guest, world: World, sandbox: Sandbox, *, ready: bool = True) -> Running:
    """A guest that can be given volumes.

    :raise DeniedError: VOLUMES_UNSUPPORTED.
    :raise UnavailableError: AGENT_UNAVAILABLE, when it must be ready and is not.
    """
    if not sandbox.machine.volumes:
        raise DeniedError(
            f"the machine of sandbox {sandbox.name!r} is of before there were volumes: stop it and"
            " start it, or restore its snapshot cold",
            reason="VOLUMES_UNSUPPORTED",
            sandbox=sandbox.id,
        )
    if ready and not guest.is_ready:
        raise UnavailableError(
            f"the agent of sandbox {sandbox.name!r} has not answered since its start:"
            " wait until it is ready",
            reason="AGENT_UNAVAILABLE",
            sandbox=sandbox.id,
        )
    return settling.running(world, guest)


def _present(sandbox: Sandbox, wish: Wish) -> Attachment | None:
    """The sandbox's attachment that is just what is wanted."""
    for each in sandbox.volumes:
        same = (each.volume, each.path, each.read_only) == (wish.volume, wish.path, wish.read_only)
        if same and each.state is not AttachmentState.DETACHING:
            return each
    return None


async def _claim(
    world: World, sandbox: Sandbox, wish: Wish, state: AttachmentState
) -> tuple[Attachment, Sandbox, bool]:
    """The claim, the sandbox's record, and whether the volume was clean before."""

    def write(tx: Transaction) -> tuple[Attachment, Sandbox, bool]:
        clean = volumes.get(tx, VolumeId(wish.volume)).clean
        attachment = claims.claim(tx, sandbox, wish, state)
        if state is AttachmentState.ATTACHING:
            volumes.note_written(tx, sandbox.id)
            volumes.forget_failure(tx, attachment.volume)
        return attachment, sandboxes.change(tx, sandbox.id), clean

    async with world.volume_locks.hold(wish.volume):
        attachment, record, clean = await world.write(write)
    hit("volume.claimed")
    world.bus.publish(Happening.UPDATED, record)
    return attachment, record, clean


async def _undo(guest: Running, attachment: Attachment, *, clean: bool) -> None:
    """Nothing of it stays; what cannot be undone now is seen to when the guest is next ready."""
    try:
        try:
            await settling.take(guest, attachment, clean=clean)
            return
        except StrataboxError as error:
            log.info("sandbox %s: volume %s is pulled out: %s", guest.id, attachment.volume, error)
        if guest.world.launcher.is_alive(guest.domain.handle):
            await settling.unplug(guest, attachment)
        await settling.release(guest.world, attachment, clean=False)
    except (StrataboxError, OSError) as error:
        log.error(
            "sandbox %s: volume %s stays half attached: %s", guest.id, attachment.volume, error
        )
