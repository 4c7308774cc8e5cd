"""The kind of value that says what sandboxes may reach."""

from __future__ import annotations

import json
from typing import ClassVar

from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.network import NO_NETWORK, PUBLIC, Network, NetworkMode, network


class NetworkWish:
    """A network policy: "none", "egress", or the rules of what may be reached."""

    allowed: ClassVar[str] = (
        '"none", "egress" for every public address, or domains and CIDRs with spaces between, as '
        '"*.example.org:443 10.1.0.0/16"'
    )

    def parse(self, raw: object) -> Network:
        """Read it."""
        if not isinstance(raw, str):
            raise ValueError("it must be a string")
        words = raw.split()
        if words == [NetworkMode.NONE]:
            return NO_NETWORK
        try:
            if words == [NetworkMode.EGRESS]:
                words = [PUBLIC]
            return network(NetworkMode.EGRESS, words)
        except InvalidArgumentError as error:
            raise ValueError(error.message) from None

    def toml(self, value: object) -> str:
        """Write it."""
        if not isinstance(value, Network) or value.mode is NetworkMode.NONE:
            return json.dumps(str(NetworkMode.NONE))
        egress = value.allow == (PUBLIC,)
        return json.dumps(str(NetworkMode.EGRESS) if egress else " ".join(value.allow))
