"""Readiness probes as JSON, the way sandboxes and snapshots keep them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from stratabox.storage.catalog.database import json_of
from stratabox.storage.model.probes import Probe


def dump(probe: Probe | None) -> str | None:
    """The column's text; NULL for none."""
    return None if probe is None else json_of(asdict(probe))


def load(text: str | None) -> Probe | None:
    """The probe behind the column's text."""
    if text is None:
        return None
    values: dict[str, Any] = json.loads(text)
    return Probe(argv=tuple(values.pop("argv")), **values)
