"""Which IPv4 addresses are special. Pure. Addresses are integers here: they are compared a lot.

*Closed* ones nobody reaches. *Guarded* ones are private, link-local or otherwise not public: they
open only by a CIDR that lies inside the guarded block itself, so that 0.0.0.0/0 opens none of them.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_right

from stratabox.storage.model.network import NEVER, OWN_NETWORK

GATEWAY = int(OWN_NETWORK[2])
NAME_SERVER = int(OWN_NETWORK[3])
FIRST_GUEST = int(OWN_NETWORK[15])
"""What a guest gets by DHCP."""
BROADCAST = 0xFFFFFFFF

GUARDED = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' NAT; also a cloud's metadata service
        "168.63.129.16/32",  # a cloud's host, at an address that is public by its number
        "169.254.0.0/16",  # link-local, and most clouds' metadata services
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
    )
)


class Ranges:
    """A set of addresses, made of disjoint networks; asking takes a microsecond."""

    def __init__(self, networks: tuple[ipaddress.IPv4Network, ...]) -> None:
        merged = sorted(ipaddress.collapse_addresses(networks))
        self._starts = [int(each.network_address) for each in merged]
        self._ends = [int(each.broadcast_address) for each in merged]

    def __contains__(self, address: int) -> bool:
        place = bisect_right(self._starts, address) - 1
        return place >= 0 and address <= self._ends[place]


_CLOSED = Ranges(NEVER)
_GUARDED = Ranges(GUARDED)


def is_closed(address: int) -> bool:
    """Tell whether no policy opens it."""
    return address in _CLOSED


def is_guarded(address: int) -> bool:
    """Tell whether only a CIDR of its own block opens it."""
    return address in _GUARDED


def is_public(address: int) -> bool:
    """Tell whether it is neither closed nor guarded."""
    return not (address in _CLOSED or address in _GUARDED)


def opens_guarded(cidr: ipaddress.IPv4Network) -> bool:
    """Tell whether a CIDR is meant for guarded addresses: it lies inside such a block."""
    return any(cidr.subnet_of(block) for block in GUARDED)
