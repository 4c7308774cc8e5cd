"""Identifiers: made here, parsed here, and safe as file names because of it.

Every id is a lower-case UUID in its canonical form. Nothing that a client sends becomes part of a
path; only ids read back from the catalog do.
"""

from __future__ import annotations

import re
import uuid
from typing import NewType

SandboxId = NewType("SandboxId", str)
SnapshotId = NewType("SnapshotId", str)
ImageId = NewType("ImageId", str)
LayerId = NewType("LayerId", str)
OperationId = NewType("OperationId", str)
VolumeId = NewType("VolumeId", str)
PortId = NewType("PortId", str)
PreviewId = NewType("PreviewId", str)
VolumeSnapshotId = NewType("VolumeSnapshotId", str)
JobId = NewType("JobId", str)
Sha256 = NewType("Sha256", str)

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PREFIX = re.compile(r"[0-9a-f-]{4,36}")


def mint() -> str:
    """Make a fresh random id (UUID 4)."""
    return str(uuid.uuid4())


def is_id(text: str) -> bool:
    """Tell whether `text` is a whole id in canonical form."""
    return _UUID.fullmatch(text) is not None


def is_id_prefix(text: str) -> bool:
    """Tell whether `text` can be the start of an id: at least 4 of its characters."""
    return _PREFIX.fullmatch(text) is not None
