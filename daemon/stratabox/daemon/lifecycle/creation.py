"""What a new sandbox is: everything of it in the catalog, before any file is made.

Its disks are new overlays, on an image's layer or on a snapshot's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from stratabox.daemon.config.keys import UID_COUNT
from stratabox.daemon.hypervisor.qemu_host import new_machine, random_mac
from stratabox.daemon.lifecycle import budget, keeping, policy
from stratabox.daemon.lifecycle.common.naming import make_up
from stratabox.daemon.lifecycle.common.once import Key
from stratabox.daemon.lifecycle.keeping import Rhythm
from stratabox.daemon.lifecycle.memory.spares import Spare, Want
from stratabox.daemon.lifecycle.policy import Resources
from stratabox.daemon.lifecycle.running import probing, wiring
from stratabox.daemon.lifecycle.seeding import wishes
from stratabox.daemon.lifecycle.volumes import claims
from stratabox.daemon.lifecycle.volumes.claims import Wish
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import images, layers, operations, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Operation
from stratabox.storage.files.store import NewOverlay
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError, NoSpaceError
from stratabox.storage.model.ids import LayerId, SandboxId, SnapshotId, mint
from stratabox.storage.model.network import NO_NETWORK, Network
from stratabox.storage.model.probes import Probe, chosen
from stratabox.storage.model.records import GIB, Disk, Layer, Machine, Sandbox, Snapshot
from stratabox.storage.model.states import (
    AttachmentState,
    Identity,
    ImageState,
    LayerState,
    SandboxState,
    SnapshotState,
    TimeoutAction,
)


@dataclass(frozen=True, kw_only=True)
class NewSandbox:
    """What to make. Exactly one of `image` and `snapshot`; neither: the default image."""

    image: str = ""
    snapshot: str = ""
    name: str = ""
    resources: Resources = field(default_factory=Resources)
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()
    cold: bool = False
    """Boot from a memory snapshot's disks instead of going on from its memory."""
    identity: Identity | None = None
    """Who it is; None: somebody new, where it is a snapshot's copy."""
    paused: bool = False
    """Leave it at its first instant."""
    verify: bool = False
    """Compare all of the snapshot's saved memory with its sums first."""
    data_disks: Sequence[int] = ()
    """GiB each."""
    volumes: Sequence[Wish] = ()
    """Mounted before it is ready."""
    expires_at: datetime | None = None
    """When `on_timeout` is done to it; None: never."""
    on_timeout: TimeoutAction = TimeoutAction.TERMINATE
    keep_last: int = 0
    """How many of its snapshots are kept; 0: all."""
    rhythm: Rhythm | None = None
    """How often snapshots of it are taken by themselves."""
    user_data: bytes = b""
    """For cloud-init."""
    ssh_keys: Sequence[str] = ()
    """That the image's user lets in; lines of an authorized_keys file."""
    seed: Path | None = None
    """The file that becomes its seed, where its image runs cloud-init; see `seeding.staging`."""
    probe: Probe | None = None
    """What must pass before it is ready; None: the snapshot's, where there is one."""
    network: Network | None = None
    """What it may reach; None: the snapshot's, or the configuration's."""
    ready_timeout: float | None = None
    """Seconds to wait until it is ready; None: do not wait."""
    also: Callable[[Transaction, SandboxId], None] | None = None
    """Joins the transaction that writes it down."""


def check(wanted: NewSandbox) -> None:
    """:raise InvalidArgumentError: for what cannot be right, whatever the state of things."""
    if wanted.image and wanted.snapshot:
        raise InvalidArgumentError("name an image or a snapshot, not both", field="snapshot")
    if wanted.name:
        policy.check_name(wanted.name)
    policy.check_resources(wanted.resources)
    policy.check_env(wanted.env)
    policy.check_metadata(wanted.metadata)
    policy.check_tags(wanted.tags)
    keeping.check_keep_last(wanted.keep_last)
    if wanted.rhythm:
        keeping.check_rhythm(wanted.rhythm)
    if wanted.probe:
        probing.check(wanted.probe)
    policy.check_data_disks(wanted.data_disks)
    policy.check_verify(wanted.verify, has_memory=bool(wanted.snapshot))
    wishes.check_keys(wanted.ssh_keys)
    if wanted.snapshot and (wanted.user_data or wanted.ssh_keys):
        raise InvalidArgumentError(
            "cloud-init has set a snapshot's guest up already: user data and SSH keys are for"
            " sandboxes that are made from an image",
            field="user_data",
        )


def identity_of(wanted: NewSandbox) -> Identity | None:
    """Who it is; None: who its disk says."""
    return wanted.identity or (Identity.RENEW if wanted.snapshot else None)


def want_of(wanted: NewSandbox, snapshot: SnapshotId) -> Want:
    """What kind of spare it could be made of."""
    return Want(snapshot, identity_of(wanted) or Identity.RENEW)


def write_down(
    world: World,
    tx: Transaction,
    wanted: NewSandbox,
    operation: Operation,
    key: Key | None,
    spare: Spare | None,
) -> tuple[Sandbox, list[NewOverlay]]:
    """Everything that a new sandbox is, in the catalog, before any file is made."""
    assert operation.sandbox is not None
    policy.check_expiry(wanted.expires_at, tx.now)
    if spare:
        wanted = replace(wanted, snapshot=spare.want.snapshot)
    if wanted.snapshot:
        draft, bases = _from_snapshot(world, tx, wanted, operation.sandbox)
    else:
        draft, bases = _from_image(world, tx, wanted, operation.sandbox)
    wiring.require(draft.machine, draft.network)
    world.admission.check(tx, operation.sandbox, draft.memory, draft.cpus)
    budget.check(tx, world.config, world.store.layout, "a sandbox")
    budget.check_growth(
        tx, world.config, world.store.layout, sum(disk.size for disk in draft.disks)
    )
    uid = None
    if spare:
        uid = spare.draft.uid
        draft = replace(
            draft,
            disks=spare.draft.disks,
            vmgenid=spare.draft.vmgenid,
            machine=spare.draft.machine,
        )
    elif world.qemu_uids:
        reserved = world.spares.reserved_uids()
        uid = sandboxes.free_uid(tx, world.config.uid_base, UID_COUNT, reserved)
        if uid is None:
            raise NoSpaceError(
                f"all {UID_COUNT} host uids for guests are taken: terminate some sandboxes",
                reason="UIDS_EXHAUSTED",
            )
    overlays = []
    for disk, base in zip(draft.disks, bases, strict=True):
        overlays.append(NewOverlay(disk.layer, base, disk.size))
        layers.insert(
            tx,
            Layer(
                id=disk.layer,
                parent=base,
                state=LayerState.ACTIVE,
                size=disk.size,
                created_at=tx.now,
            ),
        )
    operations.begin(tx, operation)
    if key:
        key.remember(tx, sandbox=operation.sandbox)
    draft = replace(
        draft,
        uid=uid,
        expires_at=wanted.expires_at,
        on_timeout=wanted.on_timeout,
        keep_last=wanted.keep_last,
        schedule=keeping.begin(wanted.rhythm, tx.now) if wanted.rhythm else None,
    )
    record = sandboxes.insert(tx, draft)
    if wanted.volumes and not draft.machine.volumes:
        raise DeniedError(
            "the machine of that memory snapshot is of before there were volumes: restore it cold",
            reason="VOLUMES_UNSUPPORTED",
            snapshot=draft.source_snapshot,
        )
    for wish in wanted.volumes:
        claims.claim(tx, record, wish, AttachmentState.ATTACHING)
    if wanted.also:
        wanted.also(tx, record.id)
    return sandboxes.get(tx, record.id), overlays


def _from_image(
    world: World, tx: Transaction, wanted: NewSandbox, sandbox: SandboxId
) -> tuple[Sandbox, list[LayerId | None]]:
    config = world.config
    reference = wanted.image or config.default_image
    if not reference:
        raise InvalidArgumentError(
            "no image is named and the configuration has no default_image: name one"
            " ('stratabox image list' shows them)",
            field="image",
        )
    image = images.get(tx, images.resolve(tx, reference))
    if image.state is not ImageState.READY or image.layer is None:
        raise DeniedError(
            f"image {image.name!r} is {image.state}", reason="IMAGE_NOT_READY", image=image.id
        )
    if (wanted.user_data or wanted.ssh_keys) and not image.cloud_init:
        raise DeniedError(
            f"image {image.name!r} is not known to run cloud-init, which takes user data and SSH"
            " keys: import it with --cloud-init",
            reason="NO_CLOUD_INIT",
            image=image.id,
        )
    storage = wanted.resources.storage
    if storage is None:
        storage = policy.default_storage(image, config.default_storage)
    policy.check_storage_holds(storage, image.size, f"image {image.name!r}")
    disks = [_disk(0, storage * GIB)]
    disks += [_disk(number, size * GIB) for number, size in enumerate(wanted.data_disks, 1)]
    bases: list[LayerId | None] = [image.layer, *(None for _ in wanted.data_disks)]
    machine = new_machine(
        world.qemu,
        world.accelerator,
        firmware=world.firmware,
        kernel_boot=image.kernel_boot,
        mac=random_mac(),
    )
    if wanted.seed:
        # In the transaction that names it: no sweep can come between.
        machine = replace(machine, seed=world.store.put_blob(wanted.seed))
    return Sandbox(
        id=sandbox,
        workspace=tx.home,
        name=wanted.name or make_up(),
        state=SandboxState.CREATING,
        image=image.id,
        image_name=image.name,
        cpus=wanted.resources.cpus or config.default_cpus,
        memory=wanted.resources.memory or config.default_memory,
        storage=storage,
        machine=machine,
        disks=tuple(disks),
        env=dict(wanted.env),
        metadata=dict(wanted.metadata),
        tags=tuple(dict.fromkeys(wanted.tags)),
        probe=chosen(wanted.probe, None),
        network=wanted.network or config.network,
        vmgenid=mint(),
        created_at=tx.now,
        updated_at=tx.now,
    ), bases


def _from_snapshot(
    world: World, tx: Transaction, wanted: NewSandbox, sandbox: SandboxId
) -> tuple[Sandbox, list[LayerId | None]]:
    snapshot = snapshots.get(tx, snapshots.resolve(tx, wanted.snapshot))
    require_ready(snapshot)
    policy.check_verify(wanted.verify, has_memory=bool(snapshot.ram) and not wanted.cold)
    if wanted.data_disks:
        raise InvalidArgumentError(
            "a snapshot brings its own data disks; none can be added", field="data_disks"
        )
    given = {each.volume for each in wanted.volumes}
    root = snapshot.disks[0].size
    storage = wanted.resources.storage
    if storage is None:
        storage = policy.gib(root)
    policy.check_storage_holds(storage, root, f"snapshot {snapshot.name!r}")
    disks = tuple(
        Disk(
            index=disk.index,
            layer=LayerId(mint()),
            size=storage * GIB if disk.index == 0 else disk.size,
            serial=disk.serial,
        )
        for disk in snapshot.disks
    )
    machine = snapshot.machine
    if snapshot.ram is None or wanted.cold:
        machine = replace(
            machine.up_to_date(),
            accelerator=world.accelerator.name,
            cpu_model=world.accelerator.cpu_model,
        )
    else:
        _require_same_size(wanted.resources, snapshot)
    return Sandbox(
        id=sandbox,
        workspace=snapshot.workspace,
        name=wanted.name or make_up(),
        state=SandboxState.CREATING,
        image=snapshot.image,
        image_name=snapshot.image_name,
        source_snapshot=snapshot.id,
        cpus=wanted.resources.cpus or snapshot.cpus,
        memory=wanted.resources.memory or snapshot.memory,
        storage=storage,
        machine=machine,
        disks=disks,
        env={**snapshot.env, **wanted.env},
        metadata=dict(wanted.metadata),
        tags=tuple(dict.fromkeys(wanted.tags)),
        probe=chosen(wanted.probe, snapshot.probe),
        network=_network_of(world, wanted, snapshot, machine),
        vmgenid=mint(),
        ram_origin=snapshot.id if snapshot.ram and not wanted.cold else None,
        left_behind=tuple(each for each in snapshot.volumes if each.volume not in given),
        created_at=tx.now,
        updated_at=tx.now,
    ), [disk.layer for disk in snapshot.disks]


def _network_of(world: World, wanted: NewSandbox, snapshot: Snapshot, machine: Machine) -> Network:
    """What a snapshot's copy may reach."""
    if wanted.network or snapshot.network:
        return wanted.network or snapshot.network or NO_NETWORK
    return world.config.network if machine.uplink else NO_NETWORK


def require_ready(snapshot: Snapshot) -> None:
    """:raise DeniedError: SNAPSHOT_NOT_READY, when it cannot be restored."""
    if snapshot.state is not SnapshotState.READY:
        because = f": {snapshot.failure_reason}" if snapshot.failure_reason else ""
        raise DeniedError(
            f"snapshot {snapshot.name!r} is {snapshot.state}{because}",
            reason="SNAPSHOT_NOT_READY",
            snapshot=snapshot.id,
            state=snapshot.state,
        )


def _require_same_size(wanted: Resources, snapshot: Snapshot) -> None:
    """:raise InvalidArgumentError: RESOURCES_FIXED, for a size that the saved memory rules out."""
    root = policy.gib(snapshot.disks[0].size)
    for name, value, fixed in (
        ("cpus", wanted.cpus, snapshot.cpus),
        ("memory", wanted.memory, snapshot.memory),
        ("storage", wanted.storage, root),
    ):
        if value is not None and value != fixed:
            raise InvalidArgumentError(
                f"{name} cannot be {value}: a memory snapshot goes on with the {fixed} that it was"
                " taken with. Restore it cold (--cold) to boot its disks with another size",
                reason="RESOURCES_FIXED",
                field=name,
                fixed=fixed,
            )


def _disk(index: int, size: int) -> Disk:
    return Disk(index=index, layer=LayerId(mint()), size=size, serial=f"disk{index}")
