"""What a sandbox may reach: the words of a network policy, read strictly and written back.

```
none                      its card has no link
egress                    it may begin connections, to what `allow` names:
    public                    every public address
    example.org               that name, whatever public addresses it has
    *.example.org             all names below it, but not itself
    10.1.0.0/16  10.1.2.3     those addresses
```

Behind each of them ports can stand, ":443" or ":80,8000-8100"; without, all ports and ICMP echo are
meant. Which addresses need more than `public` or a wide CIDR says ``hypervisor.network.addresses``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from stratabox.storage.model.errors import InvalidArgumentError

PUBLIC = "public"
"""The target that means every public address."""
MAX_RULES = 256
MAX_RANGES = 32
"""Of ports, in one rule."""

OWN_NETWORK = ipaddress.IPv4Network("10.0.2.0/24")
"""The network between a guest and its gateway; the same in every sandbox, and nowhere else."""
NEVER = (
    ipaddress.IPv4Network("0.0.0.0/8"),
    ipaddress.IPv4Network("127.0.0.0/8"),
    ipaddress.IPv4Network("224.0.0.0/3"),
    OWN_NETWORK,
)
"""What no policy opens: this host itself, loopback, multicast and beyond, the own network."""

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_PORT = re.compile(r"[0-9]{1,5}")
_LOOKS_LIKE_ADDRESS = re.compile(r"[0-9./]+")
_NAME_MAX = 253
_TEXT_MAX = 600


class NetworkMode(StrEnum):
    """Whether a sandbox has a network."""

    NONE = "none"
    EGRESS = "egress"


@dataclass(frozen=True)
class Rule:
    """One thing that a guest may reach. Exactly one of the first three is set."""

    public: bool = False
    domain: str = ""
    """In lower case, without the dot at the end; "*." at its begin means all names below."""
    cidr: ipaddress.IPv4Network | None = None
    ports: tuple[tuple[int, int], ...] = ()
    """First and last of each range, sorted; none: everything."""

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read one.

        :raise InvalidArgumentError: with what is wrong.
        """
        if len(text) > _TEXT_MAX:
            raise _wrong(text[:40] + "…", f"it has more than {_TEXT_MAX} characters")
        if text.startswith("[") or text.count(":") > 1:
            raise _wrong(text, "IPv6 is not routed; name an IPv4 network or a domain")
        target, colon, listed = text.partition(":")
        ports = _ports(text, listed) if colon else ()
        if target == PUBLIC:
            return cls(public=True, ports=ports)
        if _LOOKS_LIKE_ADDRESS.fullmatch(target):
            return cls(cidr=_cidr(text, target), ports=ports)
        return cls(domain=_domain(text, target), ports=ports)

    def __str__(self) -> str:
        if self.cidr is not None:
            single = self.cidr.prefixlen == self.cidr.max_prefixlen
            target = str(self.cidr.network_address) if single else str(self.cidr)
        else:
            target = PUBLIC if self.public else self.domain
        ports = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in self.ports)
        return f"{target}:{ports}" if ports else target

    def allows_port(self, port: int | None) -> bool:
        """Tell whether a port is meant; None stands for ICMP echo, which has none."""
        if port is None:
            return not self.ports
        return not self.ports or any(low <= port <= high for low, high in self.ports)

    def names(self, name: str) -> bool:
        """Tell whether it is a rule for that domain name (lower case, no dot at the end)."""
        if self.domain.startswith("*."):
            return name.endswith(self.domain[1:]) and len(name) >= len(self.domain)
        return bool(self.domain) and name == self.domain


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a sandbox may reach. Made by `network`, which checks it, or of a checked one's text."""

    mode: NetworkMode = NetworkMode.NONE
    allow: tuple[str, ...] = ()
    """Rules, each as `Rule` writes it; at least one for egress, else none."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules, read."""
        return tuple(Rule.parse(text) for text in self.allow)


NO_NETWORK = Network()


def network(mode: NetworkMode, allow: Iterable[str]) -> Network:
    """A policy that is sound, its rules in their own words and each once.

    :raise InvalidArgumentError: for a rule that cannot be, too many of them, egress without any,
        or rules without egress.
    """
    rules = list(dict.fromkeys(str(Rule.parse(text)) for text in allow))
    if len(rules) > MAX_RULES:
        raise InvalidArgumentError(
            f"a network allows {len(rules)} things; at most {MAX_RULES} can be named",
            field="network",
        )
    if mode is NetworkMode.EGRESS and not rules:
        raise InvalidArgumentError(
            f"network egress needs to be told what it may reach: '{PUBLIC}' for every public"
            " address, or domains and CIDRs",
            field="network",
        )
    if mode is NetworkMode.NONE and rules:
        raise InvalidArgumentError(
            f"network none reaches nothing, and {rules[0]} is allowed: choose egress",
            field="network",
        )
    return Network(mode=mode, allow=tuple(rules))


def _ports(text: str, listed: str) -> tuple[tuple[int, int], ...]:
    ranges = []
    for part in listed.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (_PORT.fullmatch(first) and _PORT.fullmatch(last)):
            raise _wrong(text, "behind the colon stand ports, as 443 or 80,8000-8100")
        low, high = int(first), int(last)
        if not 1 <= low <= high <= 65535:
            raise _wrong(text, f"{part} is no range of ports within 1-65535")
        ranges.append((low, high))
    if len(ranges) > MAX_RANGES:
        raise _wrong(text, f"it names more than {MAX_RANGES} ranges of ports")
    return tuple(sorted(set(ranges)))


def _cidr(text: str, target: str) -> ipaddress.IPv4Network:
    try:
        cidr = ipaddress.IPv4Network(target)
    except ValueError as error:
        raise _wrong(text, str(error)) from None
    for closed in NEVER:
        if cidr.subnet_of(closed):
            raise _wrong(
                text,
                f"{closed} is never reached through the network; ports of the host are forwarded"
                " into a sandbox with 'stratabox sandbox port'",
            )
    return cidr


def _domain(text: str, target: str) -> str:
    wild = target.startswith("*.")
    name = target[2:] if wild else target
    try:
        name = name.removesuffix(".").encode("idna").decode().lower()
    except UnicodeError:
        raise _wrong(text, "it is no domain name") from None
    labels = name.split(".")
    if len(name) > _NAME_MAX or not all(_LABEL.fullmatch(label) for label in labels):
        raise _wrong(text, "it is no domain name, CIDR or 'public'")
    if labels[-1].isdecimal():
        raise _wrong(text, "it is neither an address nor a domain name")
    if name == PUBLIC and not wild:  # kept as a domain it would be read as the word next time
        raise _wrong(text, f"no domain is called so; every public address is {PUBLIC!r}")
    return f"*.{name}" if wild else name


def _wrong(text: str, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{text!r} cannot be allowed: {why}", field="network", value=text)
