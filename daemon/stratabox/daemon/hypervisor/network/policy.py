"""What a policy allows, asked by address or by name. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from stratabox.daemon.hypervisor.network import addresses
from stratabox.storage.model.network import Rule


class Policy:
    """The rules of one sandbox, made ready to be asked for each packet."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._public = [rule for rule in rules if rule.public]
        self._domains = [rule for rule in rules if rule.domain]
        self._cidrs = [
            (
                int(rule.cidr.network_address),
                int(rule.cidr.broadcast_address),
                addresses.opens_guarded(rule.cidr),
                rule,
            )
            for rule in rules
            if rule.cidr is not None
        ]

    def allows_address(self, address: int, port: int | None, *, is_host: bool = False) -> bool:
        """Tell whether an address may be reached as such, whatever its names.

        :param port: None for ICMP echo.
        :param is_host: it is one of this host's own: only a rule for just that address opens it.
        """
        if addresses.is_closed(address):
            return False
        guarded = addresses.is_guarded(address)
        for low, high, opens_guarded, rule in self._cidrs:
            if (
                low <= address <= high
                and (opens_guarded or not guarded)
                and (low == high or not is_host)
                and rule.allows_port(port)
            ):
                return True
        if guarded or is_host:
            return False
        return any(rule.allows_port(port) for rule in self._public)

    def opens(self, address: int) -> bool:
        """Tell whether some port of an address may be reached as such; for answers to names."""
        if addresses.is_closed(address):
            return False
        guarded = addresses.is_guarded(address)
        return not guarded or any(
            low <= address <= high and opens_guarded for low, high, opens_guarded, _ in self._cidrs
        )

    def allows_name(self, name: str, port: int | None) -> bool:
        """Tell whether what a name stands for may be reached because of the name."""
        return any(rule.names(name) and rule.allows_port(port) for rule in self._domains)

    def answers(self, name: str) -> bool:
        """Tell whether the guest may ask for a name at all."""
        return bool(self._public) or self.pins(name)

    def pins(self, name: str) -> bool:
        """Tell whether what a name stands for becomes reachable by the answer."""
        return any(rule.names(name) for rule in self._domains)
