"""Who may have a volume, and where: decided here, and kept as rows of attachments.

One writer, or any number of readers. A claim is made before anything is done with the volume, and
given back when nothing can touch it any more; so whatever dies in between, never do two write it.
"""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stratabox.daemon.hypervisor.command_line import MAX_VOLUMES
from stratabox.storage.catalog import attachments, sandboxes, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError
from stratabox.storage.model.ids import SandboxId, VolumeId
from stratabox.storage.model.records import Attachment, Sandbox, Volume
from stratabox.storage.model.states import AttachmentState, VolumeState

PATH_BYTES = 1024
_SYSTEM = frozenset(
    ("/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys",
     "/usr")
)  # fmt: skip
_KERNEL = ("/dev/", "/proc/", "/sys/")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a caller wants a sandbox to have."""

    volume: str
    """Id, name, or start of an id; an id once it is `resolved`."""
    path: str
    """Absolute, in the guest."""
    read_only: bool = False


def check(wishes: Sequence[Wish]) -> list[Wish]:
    """The wishes with plain paths.

    :raise InvalidArgumentError: INVALID_ARGUMENT, for a path that cannot be, or is wanted twice;
        INVALID_RESOURCES, for too many.
    """
    if len(wishes) > MAX_VOLUMES:
        raise too_many()
    checked = [replace(wish, path=check_path(wish.path)) for wish in wishes]
    for number, wish in enumerate(checked):
        if any(wish.path == other.path for other in checked[:number]):
            raise InvalidArgumentError(f"two volumes are to be at {wish.path}", field="volumes")
    return checked


def check_path(path: str) -> str:
    """A path in a guest, without what means nothing.

    :raise InvalidArgumentError: when nothing can, or should, be mounted there.
    """
    plain = posixpath.normpath(path) if path.startswith("/") else ""
    if plain.startswith("//"):
        plain = plain[1:]
    problem = ""
    if not plain:
        problem = "it must be absolute"
    elif ".." in path.split("/"):
        problem = "it must not hold '..'"
    elif len(path.encode("utf-8", "surrogatepass")) > PATH_BYTES:
        problem = f"it is longer than {PATH_BYTES} bytes"
    elif "\\" in path or any(unicodedata.category(each) in ("Cc", "Cs") for each in path):
        problem = "it holds control characters or backslashes"
    elif plain in _SYSTEM or plain.startswith(_KERNEL):
        problem = "the guest's system needs that"
    if problem:
        raise InvalidArgumentError(
            f"a volume cannot be mounted at {path[:80]!r}: {problem}", field="path"
        )
    return plain


def resolved(tx: Transaction, wishes: Sequence[Wish]) -> list[Wish]:
    """The same wishes, with ids.

    :raise NotFoundError: VOLUME_NOT_FOUND.
    :raise DeniedError: AMBIGUOUS_NAME.
    """
    return [replace(wish, volume=volumes.resolve(tx, wish.volume)) for wish in wishes]


def claim(tx: Transaction, sandbox: Sandbox, wish: Wish, state: AttachmentState) -> Attachment:
    """Give a sandbox a volume, in the catalog.

    :param wish: with the volume's id.
    :raise NotFoundError: VOLUME_NOT_FOUND.
    :raise DeniedError: VOLUME_IN_USE, VOLUME_NOT_READY, VOLUME_NOT_CLEAN.
    :raise InvalidArgumentError: INVALID_ARGUMENT, when the path is another volume's;
        INVALID_RESOURCES, when it has too many.
    """
    volume = volumes.get(tx, VolumeId(wish.volume))
    require_ready(volume)
    _require_free(tx, volume, wish)
    if wish.read_only and not volume.clean:
        raise DeniedError(
            f"the file system of volume {volume.name!r} needs recovery, since who last wrote it"
            " did not let go of it in order: attach it to write once, and detach it",
            reason="VOLUME_NOT_CLEAN",
            volume=volume.id,
        )
    present = attachments.of_sandbox(tx, sandbox.id)
    for other in present:
        if other.path == wish.path:
            raise InvalidArgumentError(
                f"sandbox {sandbox.name!r} has volume {other.volume_name!r} at {wish.path}",
                field="path",
            )
    taken = {each.slot for each in present}
    slot = next((each for each in range(MAX_VOLUMES) if each not in taken), None)
    if slot is None:
        raise too_many()
    attachment = Attachment(
        volume=volume.id,
        volume_name=volume.name,
        sandbox=sandbox.id,
        path=wish.path,
        read_only=wish.read_only,
        slot=slot,
        state=state,
    )
    attachments.insert(tx, attachment)
    return attachment


def require_ready(volume: Volume) -> None:
    """:raise DeniedError: VOLUME_NOT_READY."""
    if volume.state is not VolumeState.READY:
        raise DeniedError(
            f"volume {volume.name!r} is {volume.state}", reason="VOLUME_NOT_READY", volume=volume.id
        )


def in_use(tx: Transaction, volume: Volume) -> DeniedError:
    """The error for a volume that somebody has: it names who, and how."""
    holders = [
        f"sandbox {_name(tx, each.sandbox)!r} has it to {'read' if each.read_only else 'write'},"
        f" at {each.path}"
        for each in volume.attachments
    ]
    more = f", and {len(holders) - 3} more" if len(holders) > 3 else ""
    return DeniedError(
        f"volume {volume.name!r} is in use: {'; '.join(holders[:3])}{more}. Detach it there first",
        reason="VOLUME_IN_USE",
        volume=volume.id,
        holders=",".join(each.sandbox for each in volume.attachments[:20]),
        access="read" if all(each.read_only for each in volume.attachments) else "write",
    )


def too_many() -> InvalidArgumentError:
    """The error for more volumes than a sandbox can have."""
    return InvalidArgumentError(
        f"a sandbox has at most {MAX_VOLUMES} volumes",
        reason="INVALID_RESOURCES",
        field="volumes",
        maximum=MAX_VOLUMES,
    )


def _require_free(tx: Transaction, volume: Volume, wish: Wish) -> None:
    readers = all(each.read_only for each in volume.attachments)
    if volume.attachments and not (wish.read_only and readers):
        raise in_use(tx, volume)


def _name(tx: Transaction, sandbox: SandboxId) -> str:
    return sandboxes.get(tx, sandbox).name
