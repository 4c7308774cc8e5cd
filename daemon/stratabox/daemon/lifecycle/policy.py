"""Pure decisions: is a request sound, and what does a state of things allow.

No locks, no I/O. Every refusal names the thing, the value and the limit.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from stratabox.storage.model.errors import DeniedError, InvalidArgumentError
from stratabox.storage.model.records import GIB, Image, Sandbox
from stratabox.storage.model.states import Level, SandboxState

CPUS = range(1, 33)
MEMORY = range(128, 32769)
STORAGE = range(1, 65537)
COUNT = range(1, 65)
NAME_BYTES = 255
MAX_DATA_DISKS = 8

_IMAGE_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The size of a guest; None leaves it to the default."""

    cpus: int | None = None
    memory: int | None = None
    """MiB."""
    storage: int | None = None
    """GiB."""


def check_resources(resources: Resources) -> None:
    """:raise InvalidArgumentError: INVALID_RESOURCES."""
    for field, value, allowed, unit in (
        ("cpus", resources.cpus, CPUS, ""),
        ("memory", resources.memory, MEMORY, " MiB"),
        ("storage", resources.storage, STORAGE, " GiB"),
    ):
        if value is not None and value not in allowed:
            raise InvalidArgumentError(
                f"{field} {value} is not within {allowed[0]}-{allowed[-1]}{unit}",
                reason="INVALID_RESOURCES",
                field=field,
                value=value,
                minimum=allowed[0],
                maximum=allowed[-1],
            )


def check_name(name: str, what: str = "name") -> str:
    """A name as it may be kept.

    :raise InvalidArgumentError: when it is too long, blank, or holds control characters or
        path separators.
    """
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > NAME_BYTES:
        raise InvalidArgumentError(
            f"{what} has {size} bytes; at most {NAME_BYTES} are allowed", field=what
        )
    if not name.strip():
        raise InvalidArgumentError(f"{what} is blank", field=what)
    for character in name:
        if character in "/\\" or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise InvalidArgumentError(
                f"{what} {name[:40]!r} holds {character!r}: path separators and control"
                " characters are not allowed",
                field=what,
            )
    return name


def check_image_name(name: str) -> str:
    """:raise InvalidArgumentError: when it is not a plain word."""
    if not _IMAGE_NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"image name {name[:40]!r} must be 1-128 letters, digits, '.', '_' or '-', and start"
            " with a letter or digit",
            field="name",
        )
    return name


def check_env(env: Mapping[str, str]) -> None:
    """:raise InvalidArgumentError: when it is too large or cannot be an environment."""
    _check_map("env", env, entries=256, size=128 * 1024)
    for key, value in env.items():
        if not _ENV_NAME.fullmatch(key):
            raise InvalidArgumentError(
                f"env name {key[:40]!r} is not a name: letters, digits and '_', no digit first",
                field="env",
            )
        if "\0" in value:
            raise InvalidArgumentError(f"env {key} holds a NUL character", field="env")


def check_metadata(metadata: Mapping[str, str]) -> None:
    """:raise InvalidArgumentError: when it is too large, or holds a NUL character."""
    _check_map("metadata", metadata, entries=64, size=16 * 1024)
    for key, value in metadata.items():
        if "\0" in key or "\0" in value:  # SQLite's JSON functions would not find it again
            raise InvalidArgumentError(
                f"metadata {key[:40]!r} holds a NUL character", field="metadata"
            )


def check_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """The tags, each once, in their order. :raise InvalidArgumentError: when there are too many."""
    if len(tags) > 64:
        raise InvalidArgumentError(f"{len(tags)} tags; at most 64 are allowed", field="tags")
    for tag in tags:
        check_name(tag, "tag")
        if len(tag.encode()) > 128:
            raise InvalidArgumentError(f"tag {tag[:40]!r} is longer than 128 bytes", field="tags")
    return tuple(dict.fromkeys(tags))


def check_verify(wanted: bool, *, has_memory: bool) -> None:
    """:raise InvalidArgumentError: INVALID_ARGUMENT, when there is no saved memory to verify."""
    if wanted and not has_memory:
        raise InvalidArgumentError(
            "verify compares saved memory with its checksums, and this boots from disks;"
            " 'stratabox check' looks at what is kept of disks",
            field="verify",
        )


def check_data_disks(sizes: Sequence[int]) -> None:
    """:raise InvalidArgumentError: INVALID_RESOURCES, for too many or impossible sizes (GiB)."""
    if len(sizes) > MAX_DATA_DISKS:
        raise InvalidArgumentError(
            f"{len(sizes)} data disks; at most {MAX_DATA_DISKS} are allowed",
            reason="INVALID_RESOURCES",
            field="data_disks",
        )
    for size in sizes:
        if size not in STORAGE:
            raise InvalidArgumentError(
                f"a data disk of {size} GiB is not within {STORAGE[0]}-{STORAGE[-1]}",
                reason="INVALID_RESOURCES",
                field="data_disks",
            )


def check_storage_holds(storage: int, minimum: int, what: str) -> None:
    """:raise InvalidArgumentError: INVALID_RESOURCES, when `storage` (GiB) < `minimum` bytes."""
    if storage * GIB < minimum:
        raise InvalidArgumentError(
            f"storage {storage} GiB is smaller than {what} ({gib(minimum)} GiB)",
            reason="INVALID_RESOURCES",
            field="storage",
            minimum=gib(minimum),
        )


def gib(size: int) -> int:
    """Bytes as whole GiB, rounded up."""
    return -(-size // GIB)


def check_expiry(expires_at: datetime | None, now: datetime) -> None:
    """:raise InvalidArgumentError: when it is not in the future."""
    if expires_at is not None and expires_at <= now:
        raise InvalidArgumentError(
            f"expires_at {expires_at.isoformat()} is in the past", field="expires_at"
        )


def default_storage(image: Image, configured: int) -> int:
    """Root disk of a sandbox that named none, in GiB: never smaller than the image."""
    return max(configured, gib(image.size))


def require_state(sandbox: Sandbox, *allowed: SandboxState, action: str) -> None:
    """:raise DeniedError: INVALID_STATE, when the sandbox is in no state that allows `action`."""
    if sandbox.state not in allowed:
        reason = f" ({sandbox.state_reason})" if sandbox.state_reason else ""
        way = "; resume it" if sandbox.ram_parked else ""
        raise DeniedError(
            f"cannot {action} sandbox {sandbox.name!r}: it is {sandbox.state}{reason};"
            f" that takes {' or '.join(allowed)}{way}",
            reason="INVALID_STATE",
            sandbox=sandbox.id,
            state=sandbox.state,
        )


def why_not(level: Level, sandbox: Sandbox) -> str | None:
    """Why the sandbox's state rules a level out; None when it does not."""
    if sandbox.state in (SandboxState.CREATING, SandboxState.TERMINATING, SandboxState.TERMINATED):
        return f"the sandbox is {sandbox.state}"
    if level is Level.CRASH:
        return None
    if level is Level.MEMORY:
        if not sandbox.state.has_process:
            return f"the sandbox is {sandbox.state}, so there is no memory to save"
        return None
    if sandbox.state is SandboxState.PAUSED:
        return "the sandbox is paused, so its agent cannot freeze file systems; resume it first"
    if sandbox.state is not SandboxState.RUNNING and not sandbox.clean_shutdown:
        return "the sandbox was not shut down cleanly; start it first"
    return None


def choose_level(
    wanted: Level | None, ceiling: Level, sandbox: Sandbox, *, agent_answers: bool
) -> Level:
    """The level to try: the one that was named, or the strongest that the state allows.

    :raise DeniedError: INVALID_STATE, when a named level (or any at all) is impossible.
    """
    if wanted is None:
        possible = why_not(Level.APPLICATION, sandbox) is None and (
            agent_answers or sandbox.state is not SandboxState.RUNNING
        )
        levels = list(Level)
        allowed = levels[: levels.index(ceiling) + 1]
        memory = why_not(Level.MEMORY, sandbox) is None and is_past_boot(sandbox)
        if Level.MEMORY in allowed and memory:
            wanted = Level.MEMORY
        elif Level.APPLICATION in allowed and possible:
            wanted = Level.APPLICATION
        else:
            wanted = Level.CRASH
    because = why_not(wanted, sandbox)
    if because is None and wanted is Level.MEMORY:
        _require_past_boot(sandbox)
    if because:
        raise DeniedError(
            f"no {wanted} snapshot of sandbox {sandbox.name!r} is possible: {because}",
            reason="INVALID_STATE",
            sandbox=sandbox.id,
            state=sandbox.state,
        )
    return wanted


def check_can_park(sandbox: Sandbox) -> None:
    """Whether a sandbox with a process can be paused to disk.

    :raise DeniedError: INVALID_STATE or GUEST_BOOTING.
    """
    require_state(sandbox, SandboxState.RUNNING, SandboxState.PAUSED, action="pause to disk")
    _require_past_boot(sandbox)


def is_past_boot(sandbox: Sandbox) -> bool:
    """Its agent has answered since it was started, or had before it was paused to disk."""
    return sandbox.answers or sandbox.ram_parked is not None


def _require_past_boot(sandbox: Sandbox) -> None:
    if not is_past_boot(sandbox):
        # Firmware that reads its tables at that instant finds them broken after a restore.
        raise DeniedError(
            f"sandbox {sandbox.name!r} is starting: its memory can be saved once its agent has"
            " answered",
            reason="GUEST_BOOTING",
            sandbox=sandbox.id,
        )


def _check_map(what: str, entries_of: Mapping[str, str], *, entries: int, size: int) -> None:
    if len(entries_of) > entries:
        raise InvalidArgumentError(
            f"{what} has {len(entries_of)} entries; at most {entries} are allowed", field=what
        )
    total = sum(len(key.encode()) + len(value.encode()) for key, value in entries_of.items())
    if total > size:
        raise InvalidArgumentError(
            f"{what} has {total} bytes; at most {size} are allowed", field=what
        )
    if "" in entries_of:
        raise InvalidArgumentError(f"{what} has an entry without a name", field=what)
