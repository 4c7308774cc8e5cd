"""The errors of the SDK: one class for each reason that the daemon gives.

```
StrataboxError
├── NotFoundError          SandboxNotFoundError, SnapshotNotFoundError, ImageNotFoundError,
│                          VolumeNotFoundError, VolumeSnapshotNotFoundError, JobNotFoundError,
│                          PortNotFoundError
├── AlreadyExistsError     ImageAlreadyExistsError, VolumeAlreadyExistsError, PortInUseError
├── InvalidArgumentError   InvalidResourcesError, InvalidImageError, IdempotencyMismatchError,
│                          InvalidAddressError, InvalidArchiveError, InvalidUserDataError
├── DeniedError            InvalidStateError, AmbiguousNameError, ImageInUseError,
│                          SnapshotNotReadyError, ToolMissingError, KvmUnusableError,
│                          MissingBaseError, TrustRequiredError, VolumeInUseError,
│                          VolumeNotReadyError, VolumeNotAttachedError, VolumeNotCleanError,
│                          VolumesUnsupportedError, VolumesUnsettledError,
│                          PortNotAllowedError, NoSshdError
├── FailedError            SnapshotFailedError, ImageBuildFailedError, QemuFailedError,
│                          LibvirtRefusedError, CommandFailedError, CompactFailedError,
│                          VolumeBusyError, VolumeMountFailedError, VolumeGrowFailedError,
│                          CloudInitFailedError, ConnectionRefusedByGuestError
├── ConflictError          InterruptedOperationError, ResumeMismatchError
├── NoSpaceError           AdmissionRefusedError, BudgetExceededError, StoreNearlyFullError
├── UnavailableError       AgentUnavailableError, MonitorUnavailableError,
│                          LibvirtUnavailableError, DaemonUnavailableError,
│                          DaemonEndingError, ConnectionLostError
├── CorruptError
├── DeadlineExceededError
├── UnsupportedError
└── InternalError
```

The classes of the first level say what a caller does next: mend the name, mend the request, change
the state of things, see why it failed, try again, make room, wait. A reason that this version does
not know becomes the first-level class of its status code, with `reason` as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stratabox.client.records import ExecuteResult


class StrataboxError(Exception):
    """Ancestor of every error that the SDK raises on purpose.

    :param message: A sentence for people.
    :param reason: Stable identifier in upper snake case; the class's own where none is given.
    :param metadata: Details for programs, as strings: ids, limits, figures.
    """

    default_reason = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata: dict[str, str] = dict(metadata or {})


class NotFoundError(StrataboxError):
    """Nothing has that id or name."""

    default_reason = "NOT_FOUND"


class SandboxNotFoundError(NotFoundError):
    """No sandbox has that id or name."""

    default_reason = "SANDBOX_NOT_FOUND"


class ProcessNotFoundError(NotFoundError):
    """No detached process of that sandbox has that id."""

    default_reason = "PROCESS_NOT_FOUND"


class SnapshotNotFoundError(NotFoundError):
    """No snapshot has that id or name."""

    default_reason = "SNAPSHOT_NOT_FOUND"


class ImageNotFoundError(NotFoundError):
    """No image has that id or name."""

    default_reason = "IMAGE_NOT_FOUND"


class JobNotFoundError(NotFoundError):
    """No job has that id; those that were over a day ago are forgotten."""

    default_reason = "JOB_NOT_FOUND"


class AlreadyExistsError(StrataboxError):
    """The name is taken."""

    default_reason = "ALREADY_EXISTS"


class ImageAlreadyExistsError(AlreadyExistsError):
    """Another image has that name."""

    default_reason = "IMAGE_ALREADY_EXISTS"


class InvalidArgumentError(StrataboxError):
    """The request cannot be right, whatever the state of things."""

    default_reason = "INVALID_ARGUMENT"


class InvalidResourcesError(InvalidArgumentError):
    """cpus, memory or storage are out of their limits."""

    default_reason = "INVALID_RESOURCES"


class ResourcesFixedError(InvalidArgumentError):
    """A memory snapshot goes on with the size that it was taken with; restored cold, with any."""

    default_reason = "RESOURCES_FIXED"


class InvalidUserDataError(InvalidArgumentError):
    """cloud-init would pass over it; the message says why."""

    default_reason = "INVALID_USER_DATA"


class InvalidImageError(InvalidArgumentError):
    """The file is no disk image that can be taken in."""

    default_reason = "INVALID_IMAGE"


class InvalidArchiveError(InvalidArgumentError):
    """It is no archive that can be taken in, or it is damaged; the message says where."""

    default_reason = "INVALID_ARCHIVE"


class IdempotencyMismatchError(InvalidArgumentError):
    """The idempotency key was used with another request within the last 24 hours."""

    default_reason = "IDEMPOTENCY_MISMATCH"


class InvalidAddressError(InvalidArgumentError):
    """The daemon's address, or the file that should name it, cannot be read. Raised locally."""

    default_reason = "INVALID_ADDRESS"


class DeniedError(StrataboxError):
    """Not in this state of things; change that first."""

    default_reason = "FAILED_PRECONDITION"


class InvalidStateError(DeniedError):
    """The state of the sandbox or snapshot does not allow this."""

    default_reason = "INVALID_STATE"


class AmbiguousNameError(DeniedError):
    """Several have that name or that start of an id; use a whole id."""

    default_reason = "AMBIGUOUS_NAME"


class ImageInUseError(DeniedError):
    """Something needs the image; the metadata names what."""

    default_reason = "IMAGE_IN_USE"


class SnapshotNotReadyError(DeniedError):
    """The snapshot is still being taken, or it failed."""

    default_reason = "SNAPSHOT_NOT_READY"


class MissingBaseError(DeniedError):
    """The archive stands on layers that are not there: import what it was exported since first."""

    default_reason = "MISSING_BASE"


class TrustRequiredError(DeniedError):
    """Memory of an archive was not taken, as it was not said that it can be trusted."""

    default_reason = "TRUST_REQUIRED"


class ToolMissingError(DeniedError):
    """A program that this needs is not installed on the daemon's host."""

    default_reason = "TOOL_MISSING"


class GuestBootingError(DeniedError):
    """The guest is starting: its memory can be saved once its agent has answered."""

    default_reason = "GUEST_BOOTING"


class MachineMismatchError(DeniedError):
    """The memory of that snapshot cannot go on on the daemon's host; its disks can (cold)."""

    default_reason = "MACHINE_MISMATCH"


class KvmUnusableError(DeniedError):
    """KVM was asked for and cannot run guests on the daemon's host."""

    default_reason = "KVM_UNUSABLE"


class FailedError(StrataboxError):
    """It was tried, it failed, and what was begun was undone."""

    default_reason = "FAILED"


class SnapshotFailedError(FailedError):
    """The snapshot was not taken. Its record, with the reason, stays until it is deleted."""

    default_reason = "SNAPSHOT_FAILED"

    @property
    def snapshot_id(self) -> str | None:
        """Id of the failed record."""
        return self.metadata.get("snapshot_id")


class ImageBuildFailedError(FailedError):
    """The image was not built."""

    default_reason = "IMAGE_BUILD_FAILED"


class QemuFailedError(FailedError):
    """QEMU did not start, or refused what it was told."""

    default_reason = "QEMU_FAILED"


class LibvirtRefusedError(FailedError):
    """libvirt does not start the guest; the message has its words, the metadata its `code`."""

    default_reason = "LIBVIRT_REFUSED"


class CompactFailedError(FailedError):
    """The snapshot was not compressed; the metadata names the job and its cause."""

    default_reason = "COMPACT_FAILED"


class CloudInitFailedError(FailedError):
    """The guest's cloud-init did not do all that its user data says; the message has its words."""

    default_reason = "CLOUD_INIT_FAILED"


class CommandFailedError(FailedError):
    """The command did not end with exit code 0. Raised by `ExecuteResult.check` alone."""

    default_reason = "COMMAND_FAILED"

    def __init__(self, message: str, result: ExecuteResult) -> None:
        super().__init__(message)
        self.result = result


class ConflictError(StrataboxError):
    """Overtaken by another request; look again, then try again."""

    default_reason = "CONFLICT"


class ResumeMismatchError(ConflictError):
    """What was received of an archive is of something else, or of a record that has changed."""

    default_reason = "RESUME_MISMATCH"


class InterruptedOperationError(ConflictError):
    """What this worked on was ended meanwhile."""

    default_reason = "INTERRUPTED"


class NoSpaceError(StrataboxError):
    """No room on the daemon's host."""

    default_reason = "NO_SPACE"


class AdmissionRefusedError(NoSpaceError):
    """No room for one more guest: of metadata's `resource`, in MiB where it is memory or disk."""

    default_reason = "ADMISSION_REFUSED"


class BudgetExceededError(NoSpaceError):
    """The daemon's store has all that its budget allows; the metadata has the figures, in bytes."""

    default_reason = "BUDGET_EXCEEDED"


class StoreNearlyFullError(NoSpaceError):
    """The file system of the daemon's store is fuller than its high-water mark allows."""

    default_reason = "STORE_NEARLY_FULL"


class UnavailableError(StrataboxError):
    """Something does not answer; wait, or mend it."""

    default_reason = "UNAVAILABLE"


class AgentUnavailableError(UnavailableError):
    """The guest's agent does not answer."""

    default_reason = "AGENT_UNAVAILABLE"


class MonitorUnavailableError(UnavailableError):
    """QEMU's monitor does not answer."""

    default_reason = "MONITOR_UNAVAILABLE"


class LibvirtUnavailableError(UnavailableError):
    """libvirt does not answer on the daemon's host."""

    default_reason = "LIBVIRT_UNAVAILABLE"


class DaemonUnavailableError(UnavailableError):
    """No daemon answers at the address. It may or may not have done what was asked.

    :ivar address: Where one was looked for.
    """

    default_reason = "DAEMON_UNAVAILABLE"

    def __init__(self, message: str, *, address: str) -> None:
        super().__init__(message, metadata={"address": address})
        self.address = address


class DaemonEndingError(UnavailableError):
    """The daemon was told to end, by a restart say, and the call was not over in time.

    What it had begun is broken off and undone, or goes on to its end: when the daemon is back, look
    what has come of it, or ask again with the same idempotency key.
    """

    default_reason = "DAEMON_ENDING"

    @property
    def begun(self) -> bool:
        """False: it came too late, and may be asked again as it is."""
        return self.metadata.get("begun") != "no"


class CorruptError(StrataboxError):
    """Stored bytes or rows are not what they must be."""

    default_reason = "CORRUPT"


class DeadlineExceededError(StrataboxError):
    """The caller's time was up. A snapshot goes on; a create, restore or clone is undone."""

    default_reason = "DEADLINE_EXCEEDED"


class UnsupportedError(StrataboxError):
    """The daemon does not know this call: it is older than this client."""

    default_reason = "UNIMPLEMENTED"


class InternalError(StrataboxError):
    """A bug; the daemon's log says more."""

    default_reason = "INTERNAL"


def _by_reason(root: type[StrataboxError]) -> dict[str, type[StrataboxError]]:
    found = {root.default_reason: root}
    for child in root.__subclasses__():
        if child not in _LOCAL:
            found |= _by_reason(child)
    return found


# Raised by this side alone: not to be made from a reason that came over the wire.
_LOCAL = (CommandFailedError, DaemonUnavailableError, InvalidAddressError)

_BY_REASON = _by_reason(StrataboxError) | {
    "UIDS_EXHAUSTED": NoSpaceError,
    "CATALOG_CORRUPT": CorruptError,
    "LAYER_MISSING": CorruptError,
    "FAILED": FailedError,
    # FAILED_PRECONDITION stands for both of these kinds; a failure is the one that must be named.
    "HOST_DISK_FAILED": FailedError,
    "FREEZE_FAILED": FailedError,
    "GUEST_ENDED": FailedError,
    "AGENT_FAILED": FailedError,
    "QEMU_IMG_FAILED": FailedError,
    "MKFS_FAILED": FailedError,
    "SNAPSHOT_UNSETTLED": FailedError,
    "LISTEN_FAILED": FailedError,
    "SSHD_FAILED": FailedError,
    "CGROUP_FAILED": FailedError,
}


def learn(*kinds: type[StrataboxError]) -> None:
    """Know classes of reasons that are defined elsewhere."""
    _BY_REASON.update((kind.default_reason, kind) for kind in kinds)


def from_reason(
    reason: str,
    message: str,
    metadata: Mapping[str, str] | None = None,
    *,
    otherwise: type[StrataboxError] = StrataboxError,
) -> StrataboxError:
    """Make the exception of a reason, or an `otherwise` for one that is not known here."""
    return _BY_REASON.get(reason, otherwise)(message, reason=reason, metadata=metadata)
