"""What the SDK returns of volumes; the conventions are those of `records`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from stratabox.client.records import AttachmentState, SnapshotLevel, Space


class VolumeState(StrEnum):
    """Where a volume is in its life."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class VolumeAttachment:
    """Who has a volume, and how."""

    sandbox_id: str
    path: str
    read_only: bool
    state: AttachmentState


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A disk with a life of its own."""

    id: str
    name: str
    state: VolumeState
    #: What is wrong with it, where something is.
    reason: str | None
    size_bytes: int
    #: Id of the volume or volume snapshot that it was made from.
    source_id: str | None
    metadata: Mapping[str, str] = field(hash=False)
    #: One that writes, or any number that read.
    attachments: tuple[VolumeAttachment, ...]
    created_at: datetime
    updated_at: datetime
    generation: int
    #: As it is now: it changes without the record, and so is no part of what makes two equal.
    space: Space = field(compare=False)
    #: Its file system needs no recovery: nobody writes it, and the last one let go in order.
    clean: bool


@dataclass(frozen=True, kw_only=True)
class VolumeSnapshot:
    """What a volume was at one instant."""

    id: str
    name: str
    volume_id: str
    volume_name: str
    size_bytes: int
    consistency: SnapshotLevel
    created_at: datetime
    generation: int
    #: As it is now: it changes without the record, and so is no part of what makes two equal.
    space: Space = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class VolumeDeletion:
    """What deleting a volume, or a snapshot of one, did to the host's disk."""

    id: str
    freed_bytes: int
