"""The errors about volumes: part of the tree in `errors`."""

from __future__ import annotations

from stratabox.client import errors


class VolumeNotFoundError(errors.NotFoundError):
    """No volume has that id or name."""

    default_reason = "VOLUME_NOT_FOUND"


class VolumeSnapshotNotFoundError(errors.NotFoundError):
    """No snapshot of a volume has that id or name."""

    default_reason = "VOLUME_SNAPSHOT_NOT_FOUND"


class VolumeAlreadyExistsError(errors.AlreadyExistsError):
    """Another volume has that name."""

    default_reason = "VOLUME_ALREADY_EXISTS"


class VolumeInUseError(errors.DeniedError):
    """A sandbox has the volume; the message names it and how, the metadata its id (holders)."""

    default_reason = "VOLUME_IN_USE"


class VolumeNotReadyError(errors.DeniedError):
    """The volume is being made, or removed."""

    default_reason = "VOLUME_NOT_READY"


class VolumeNotAttachedError(errors.DeniedError):
    """The sandbox does not have that volume."""

    default_reason = "VOLUME_NOT_ATTACHED"


class VolumeNotCleanError(errors.DeniedError):
    """The volume's file system needs recovery: attach it to write once, and detach it."""

    default_reason = "VOLUME_NOT_CLEAN"


class VolumesUnsupportedError(errors.DeniedError):
    """The machine is of before there were volumes: stop and start it, or restore it cold."""

    default_reason = "VOLUMES_UNSUPPORTED"


class VolumesUnsettledError(errors.DeniedError):
    """A guest's memory cannot be saved while its volumes are not where they are to be."""

    default_reason = "VOLUMES_UNSETTLED"


class VolumeBusyError(errors.FailedError):
    """The guest does not let go of the volume; the metadata names the processes that use it."""

    default_reason = "VOLUME_BUSY"


class VolumeMountFailedError(errors.FailedError):
    """The guest could not mount the volume; the message has its words."""

    default_reason = "VOLUME_MOUNT_FAILED"


class VolumeGrowFailedError(errors.FailedError):
    """The volume's disk has grown, and its file system has not."""

    default_reason = "VOLUME_GROW_FAILED"


errors.learn(
    VolumeNotFoundError,
    VolumeSnapshotNotFoundError,
    VolumeAlreadyExistsError,
    VolumeInUseError,
    VolumeNotReadyError,
    VolumeNotAttachedError,
    VolumeNotCleanError,
    VolumesUnsupportedError,
    VolumesUnsettledError,
    VolumeBusyError,
    VolumeMountFailedError,
    VolumeGrowFailedError,
)
