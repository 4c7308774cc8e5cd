"""Network policies as JSON, the way sandboxes and snapshots keep them."""

from __future__ import annotations

import json
from typing import Any

from stratabox.storage.catalog.database import json_of
from stratabox.storage.model.network import Network, NetworkMode


def dump(network: Network | None) -> str | None:
    """The column's text; NULL for none."""
    if network is None:
        return None
    return json_of({"mode": network.mode, "allow": list(network.allow)})


def load(text: str | None) -> Network | None:
    """The policy behind the column's text."""
    if text is None:
        return None
    values: dict[str, Any] = json.loads(text)
    return Network(mode=NetworkMode(values["mode"]), allow=tuple(values["allow"]))
