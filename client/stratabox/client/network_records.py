"""What a sandbox may reach."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class NetworkMode(StrEnum):
    """Whether a sandbox has a network."""

    NONE = "none"
    #: It may begin connections to what is allowed.
    EGRESS = "egress"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a sandbox may reach.

    Where one is asked for, "none", "egress" (every public address) or a list of what is allowed
    will do as well.
    """

    mode: NetworkMode = NetworkMode.EGRESS
    #: "public" for every public address, a domain ("example.org", or "*.example.org" for all names
    #: below it), an IPv4 address or CIDR; with ":PORTS" behind, as ":443" or ":80,8000-8100", only
    #: those.
    allow: tuple[str, ...] = ()
