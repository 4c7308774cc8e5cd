"""The walls: what becomes of each frame that the guest sends or would get. Pure: no I/O here.

```
 guest's frame ─▶ malformed, not ours ─▶ dropped         slirp's frame ─▶ answers a flow? ─▶ guest
                ├ DHCP, ARP, gateway's echo ─▶ slirp                    └ no: dropped
                ├ DNS to 10.0.2.3 ─▶ `ask`
                ├ of a known flow ─▶ slirp
                ├ begins one, and the policy allows it ─▶ slirp, and a flow
                └ else ─▶ refused: RST or ICMP unreachable, so that who asked knows at once
```

A *flow* is a TCP connection or a UDP exchange that the guest began. What comes in without one is
dropped, whatever libslirp thinks of it. When the policy changes, flows that it no longer allows are
reset on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stratabox.daemon.hypervisor.network import addresses, packets
from stratabox.daemon.hypervisor.network.packets import (
    ACK,
    FIN,
    RST,
    SYN,
    TCP,
    UDP,
    Malformed,
    Packet,
)
from stratabox.daemon.hypervisor.network.policy import Policy
from stratabox.storage.model.network import OWN_NETWORK

MAX_FLOWS = 4096
UDP_SECONDS = 300.0
"""How long a UDP exchange may be silent until it is over; libslirp's own is shorter."""
CLOSED_SECONDS = 60.0
"""How long a TCP connection that was closed is remembered, for what is sent again."""
SWEEP_SECONDS = 15.0
MAX_PINS = 4096
MIN_PIN, MAX_PIN = 60.0, 86400.0
"""Seconds that an address stays allowed after an answer to an allowed name, whatever its TTL."""

_OWN_FIRST = int(OWN_NETWORK.network_address)
_OWN_LAST = int(OWN_NETWORK.broadcast_address)
_MULTICAST = 0xE0000000
_DNS, _DHCP_SERVER, _DHCP_CLIENT = 53, 67, 68


@dataclass
class Counters:
    """What has gone through since the helper began."""

    received_bytes: int = 0
    """By the guest; whole frames."""
    received_packets: int = 0
    sent_bytes: int = 0
    sent_packets: int = 0
    connections: int = 0
    """TCP connections that the guest was let begin."""
    refused: int = 0
    """Packets of the guest that the policy refused."""
    dropped: int = 0
    """Frames, either way, that were none that can be passed on."""
    names_asked: int = 0
    names_refused: int = 0


class Flow:
    """One connection or exchange."""

    __slots__ = ("fins", "guest_ack", "key", "last", "macs", "name", "port", "slirp_ack", "target")

    def __init__(self, packet: Packet, name: str, now: float) -> None:
        self.key = packet.key
        self.macs = packet.frame[:12]
        self.target = packet.target
        self.port = packet.target_port
        self.name = name
        """Because of which it is allowed; "": because of its address."""
        self.guest_ack = 0
        """What the guest expects next."""
        self.slirp_ack = 0
        """What libslirp expects next."""
        self.fins = 0
        self.last = now

    @property
    def ends(self) -> tuple[int, int, int, int]:
        """Guest's address and port, then the other's."""
        key = self.key
        return (
            int.from_bytes(key[:4], "big"),
            int.from_bytes(key[8:10], "big"),
            self.target,
            self.port,
        )


class Walls:
    """The walls of one guest.

    :param is_host: tells whether an address is one of this host's own.
    :param clock: seconds, never going back.
    :param to_slirp, to_guest: take a frame.
    :param ask: takes a question of the guest's to its name server.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        is_host: Callable[[int], bool],
        clock: Callable[[], float],
        to_slirp: Callable[[bytes], None],
        to_guest: Callable[[bytes], None],
        ask: Callable[[Packet], None],
    ) -> None:
        self.policy = policy
        self.counters = Counters()
        self._is_host = is_host
        self._clock = clock
        self._to_slirp = to_slirp
        self._to_guest = to_guest
        self._ask = ask
        self._tcp: dict[bytes, Flow] = {}
        self._udp: dict[bytes, Flow] = {}
        self._pins: dict[tuple[int, str], float] = {}
        """Address and the name that it was the answer to → until when."""
        self._names: dict[int, set[str]] = {}
        self._swept = clock()

    # From the guest

    def from_guest(self, frame: bytes) -> None:
        """Do with a frame of the guest's what is to be done with it."""
        kind = frame[12:14]
        try:
            if kind == packets.TYPE_IP:
                packet = Packet(frame)
            elif kind == packets.TYPE_ARP:
                self._pass(packets.arp(frame))
                return
            else:
                raise Malformed
        except Malformed:
            self.counters.dropped += 1
            return
        if packet.protocol == TCP:
            self._tcp_from_guest(packet)
        elif packet.protocol == UDP:
            self._udp_from_guest(packet)
        else:
            self._icmp_from_guest(packet)

    def _tcp_from_guest(self, packet: Packet) -> None:
        flow = self._tcp.get(packet.key)
        flags = packet.flags
        if flags & (SYN | ACK | RST | FIN) == SYN:
            if flow is None or self._allowed(packet.target, packet.target_port) is None:
                flow = self._begin(packet, self._tcp)
                if flow is None:
                    return
                self.counters.connections += 1
                flow.slirp_ack = packet.seq + 1 & 0xFFFFFFFF
        elif flow is None:
            # Of before a restore, or forgotten: whoever sent it must not wait for an answer.
            self._answer(packets.refusal(packet))
            return
        if flags & ACK:
            flow.guest_ack = packet.ack
        flow.last = self._clock()
        if flags & RST:
            del self._tcp[packet.key]
        elif flags & FIN:
            flow.fins |= 1
        self._pass(packet.frame)

    def _udp_from_guest(self, packet: Packet) -> None:
        port = packet.target_port
        if port == _DHCP_SERVER and packet.source_port == _DHCP_CLIENT:
            if packet.target in (addresses.BROADCAST, addresses.GATEWAY):
                self._pass(packet.frame)
                return
        elif port == _DNS and packet.target == addresses.NAME_SERVER and _is_guest(packet.source):
            self.counters.names_asked += 1
            self._ask(packet)
            return
        flow = self._udp.get(packet.key) or self._begin(packet, self._udp)
        if flow is not None:
            flow.last = self._clock()
            self._pass(packet.frame)

    def _icmp_from_guest(self, packet: Packet) -> None:
        if packet.frame[34] != 8 or not _is_guest(packet.source):
            self.counters.dropped += 1
        elif (
            packet.target in (addresses.GATEWAY, addresses.NAME_SERVER)
            or self._allowed(packet.target, None) is not None
        ):
            self._pass(packet.frame)
        else:
            self._refuse(packet)

    def _begin(self, packet: Packet, flows: dict[bytes, Flow]) -> Flow | None:
        """A new flow; None: it was refused."""
        if not _is_guest(packet.source):
            self.counters.dropped += 1
            return None
        name = self._allowed(packet.target, packet.target_port)
        now = self._clock()
        if name is None or not self._has_room(flows, now):
            flows.pop(packet.key, None)
            self._refuse(packet)
            return None
        flow = flows[packet.key] = Flow(packet, name, now)
        return flow

    def _has_room(self, flows: dict[bytes, Flow], now: float) -> bool:
        if now - self._swept >= SWEEP_SECONDS:
            self._sweep(now)
        if len(flows) >= MAX_FLOWS and flows is self._udp:
            del flows[min(flows, key=lambda key: flows[key].last)]
        return len(flows) < MAX_FLOWS

    def _sweep(self, now: float) -> None:
        self._swept = now
        for key, flow in list(self._udp.items()):
            if now - flow.last > UDP_SECONDS:
                del self._udp[key]
        for key, flow in list(self._tcp.items()):
            if flow.fins == 3 and now - flow.last > CLOSED_SECONDS:
                del self._tcp[key]
        for pin, until in list(self._pins.items()):
            if until < now:
                self._unpin(pin)

    def _refuse(self, packet: Packet) -> None:
        if packet.target >= _MULTICAST or packet.target == _OWN_LAST:
            self.counters.dropped += 1  # nobody waits for an answer to what goes to everybody
            return
        self.counters.refused += 1
        self._answer(packets.refusal(packet))

    def _pass(self, frame: bytes) -> None:
        self.counters.sent_bytes += len(frame)
        self.counters.sent_packets += 1
        self._to_slirp(frame)

    # To the guest

    def from_slirp(self, frame: bytes) -> None:
        """Do with a frame for the guest what is to be done with it."""
        if not self._expects(frame):
            self.counters.dropped += 1
            return
        self._answer(frame)

    def _expects(self, frame: bytes) -> bool:
        if frame[12:14] == packets.TYPE_ARP:
            return True
        if frame[12:14] != packets.TYPE_IP:
            return False
        try:
            packet = Packet(frame)
        except Malformed:
            return False
        if packet.protocol == UDP:
            if packet.source == addresses.GATEWAY and packet.source_port == _DHCP_SERVER:
                return packet.target_port == _DHCP_CLIENT
            flow = self._udp.get(packet.reverse_key)
        elif packet.protocol == TCP:
            flow = self._tcp.get(packet.reverse_key)
        else:
            # Answers to echoes that were allowed, and errors of libslirp's own.
            return packet.frame[34] in (0, 3, 11)
        if flow is None:
            return False
        flow.last = self._clock()
        if packet.protocol == TCP:
            if packet.flags & ACK:
                flow.slirp_ack = packet.ack
            if packet.flags & RST:
                del self._tcp[flow.key]
            elif packet.flags & FIN:
                flow.fins |= 2
        return True

    def answer(self, packet: Packet, payload: bytes) -> None:
        """Give the guest the answer to a question that `ask` got."""
        self._answer(packets.udp_answer(packet, payload))

    def _answer(self, frame: bytes | None) -> None:
        if frame is not None:
            self.counters.received_bytes += len(frame)
            self.counters.received_packets += 1
            self._to_guest(frame)

    # The policy

    def change(self, policy: Policy) -> None:
        """Hold to another policy from now on; what it does not allow ends at once."""
        self.policy = policy
        for pin in list(self._pins):
            if not policy.pins(pin[1]):
                self._unpin(pin)
        self._udp = {key: flow for key, flow in self._udp.items() if self._still(flow)}
        for key, flow in list(self._tcp.items()):
            if not self._still(flow):
                del self._tcp[key]
                self._reset(flow)

    def pin(self, address: int, name: str, ttl: float) -> None:
        """Let the guest reach an address that was the answer to an allowed name.

        :param ttl: seconds; kept a little longer than the guest may use the answer.
        """
        now = self._clock()
        if (address, name) not in self._pins and len(self._pins) >= MAX_PINS:
            self._sweep(now)
            if len(self._pins) >= MAX_PINS:
                self._unpin(min(self._pins, key=lambda pin: self._pins[pin]))
        until = now + min(max(ttl, MIN_PIN), MAX_PIN) + MIN_PIN
        self._pins[address, name] = max(until, self._pins.get((address, name), 0))
        self._names.setdefault(address, set()).add(name)

    def _unpin(self, pin: tuple[int, str]) -> None:
        del self._pins[pin]
        address, name = pin
        self._names[address].discard(name)
        if not self._names[address]:
            del self._names[address]

    def _allowed(self, address: int, port: int | None) -> str | None:
        """The name because of which it may be reached, "" for its address; None: it may not."""
        if addresses.is_closed(address):
            return None
        is_host = self._is_host(address)
        if self.policy.allows_address(address, port, is_host=is_host):
            return ""
        if is_host or not addresses.is_public(address):
            return None
        now = self._clock()
        for name in self._names.get(address, ()):
            if self._pins[address, name] >= now and self.policy.allows_name(name, port):
                return name
        return None

    def _still(self, flow: Flow) -> bool:
        is_host = self._is_host(flow.target)
        if self.policy.allows_address(flow.target, flow.port, is_host=is_host):
            return True
        return bool(flow.name) and self.policy.allows_name(flow.name, flow.port)

    def _reset(self, flow: Flow) -> None:
        """Have both sides see the connection end."""
        source, source_port, target, target_port = flow.ends
        self._to_slirp(
            packets.tcp_segment(flow.macs, flow.ends, flow.slirp_ack, flow.guest_ack, RST | ACK)
        )
        self._answer(
            packets.tcp_segment(
                flow.macs[6:12] + flow.macs[:6],
                (target, target_port, source, source_port),
                flow.guest_ack,
                flow.slirp_ack,
                RST | ACK,
            )
        )


def _is_guest(source: int) -> bool:
    """Tell whether an address can be a guest's own."""
    return _OWN_FIRST < source < _OWN_LAST and source not in (
        addresses.GATEWAY,
        addresses.NAME_SERVER,
    )
