"""The records of exports and imports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stratabox.client.errors import StrataboxError
from stratabox.client.records import Snapshot


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """An archive that was received whole."""

    #: Where it is; None: it was written to an open file.
    path: Path | None
    archive_bytes: int
    #: What it holds, before it was packed.
    content_bytes: int
    #: Of the archive, received by an earlier call that was broken off.
    resumed_bytes: int


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """A snapshot that came from an archive."""

    snapshot: Snapshot
    #: Why the archive's memory was not taken (TrustRequiredError), where it has some.
    left_out: StrataboxError | None
