"""Frames read strictly, and what becomes of them."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratabox.daemon.hypervisor.network import addresses, packets, walls
from stratabox.daemon.hypervisor.network.packets import ACK, FIN, RST, SYN, Malformed, Packet
from stratabox.daemon.hypervisor.network.policy import Policy
from stratabox.daemon.hypervisor.network.walls import Walls
from stratabox.storage.model.network import Rule

MACS = bytes.fromhex("52550a000202525400123456")
GUEST = "10.0.2.15"


def at(text: str) -> int:
    return int(ipaddress.IPv4Address(text))


def tcp(to: str, port: int, flags: int, seq: int = 1000, ack: int = 0, sport: int = 4000,
        source: str = GUEST) -> bytes:  # fmt: skip
    return packets.tcp_segment(MACS, (at(source), sport, at(to), port), seq, ack, flags)


def back(frame: bytes, flags: int, seq: int = 7000, ack: int = 0) -> bytes:
    """What the other side of a guest's segment sends."""
    sent = Packet(frame)
    ends = (sent.target, sent.target_port, sent.source, sent.source_port)
    return packets.tcp_segment(packets.back(sent), ends, seq, ack, flags)


def udp(
    to: str, port: int, payload: bytes = b"hello", sport: int = 4000, source: str = GUEST
) -> bytes:
    head = struct.pack("!HHHH", sport, port, 8 + len(payload), 0)
    return packets.ip_frame(MACS, packets.UDP, at(source), at(to), head + payload)


def echo(to: str, source: str = GUEST) -> bytes:
    return packets.ip_frame(MACS, packets.ICMP, at(source), at(to), b"\x08\0\0\0\0\x01\0\x01")


class Rig:
    """Walls, and all that came out of them."""

    def __init__(self, *rules: str, host: tuple[str, ...] = ()) -> None:
        self.to_slirp: list[bytes] = []
        self.to_guest: list[bytes] = []
        self.asked: list[Packet] = []
        self.now = 100.0
        self.host = {at(each) for each in host}
        self.walls = Walls(
            policy(*rules),
            is_host=self.host.__contains__,
            clock=lambda: self.now,
            to_slirp=self.to_slirp.append,
            to_guest=self.to_guest.append,
            ask=self.asked.append,
        )

    def send(self, frame: bytes) -> str:
        """What became of a guest's frame: "passed", "refused", "asked" or "dropped"."""
        before = len(self.to_slirp), len(self.to_guest), len(self.asked)
        self.walls.from_guest(frame)
        after = len(self.to_slirp), len(self.to_guest), len(self.asked)
        changed = (after[0] - before[0], after[1] - before[1], after[2] - before[2])
        return {
            (1, 0, 0): "passed",
            (0, 1, 0): "refused",
            (0, 0, 1): "asked",
            (0, 0, 0): "dropped",
        }[changed]

    def receives(self, frame: bytes) -> bool:
        """Whether the guest gets a frame of libslirp's."""
        before = len(self.to_guest)
        self.walls.from_slirp(frame)
        return len(self.to_guest) > before


def policy(*rules: str) -> Policy:
    return Policy([Rule.parse(rule) for rule in rules])


@given(st.binary(max_size=200))
def test_no_frame_breaks_anything(frame: bytes) -> None:
    rig = Rig("public")
    rig.walls.from_guest(frame)
    rig.walls.from_slirp(frame)
    assert all(len(each) <= len(frame) for each in rig.to_slirp)


@given(st.sampled_from(["tcp", "udp", "icmp"]), st.integers(0, 90), st.integers(0, 255))
def test_a_changed_byte_never_passes_what_is_refused(kind: str, place: int, value: int) -> None:
    """Whatever one byte says, nothing leaves for an address that is not allowed."""
    make: dict[str, Callable[[], bytes]] = {
        "tcp": lambda: tcp("10.9.9.9", 80, SYN),
        "udp": lambda: udp("10.9.9.9", 80),
        "icmp": lambda: echo("10.9.9.9"),
    }
    frame = bytearray(make[kind]())
    frame[place % len(frame)] = value
    rig = Rig("public")
    rig.walls.from_guest(bytes(frame))
    for passed in rig.to_slirp:
        if passed[12:14] == packets.TYPE_IP:
            target = int.from_bytes(passed[30:34], "big")
            assert addresses.is_public(target) or target in (addresses.GATEWAY, addresses.BROADCAST)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f[:14] + b"\x46" + f[15:],  # options
        lambda f: f[:14] + b"\x65" + f[15:],  # IPv6
        lambda f: f[:20] + b"\x20\x00" + f[22:],  # more fragments
        lambda f: f[:20] + b"\x00\x01" + f[22:],  # a later fragment
        lambda f: f[:20] + b"\x80\x00" + f[22:],  # reserved
        lambda f: f[:16] + b"\x00\x13" + f[18:],  # shorter than its header
        lambda f: f[:16] + b"\xff\xff" + f[18:],  # longer than the frame
        lambda f: f[:23] + b"\x2f" + f[24:],  # GRE
        lambda f: f[:46] + b"\x40" + f[47:],  # TCP's header too short
        lambda f: f[:46] + b"\xf0" + f[47:],  # and too long
        lambda f: f[:30],
        lambda f: f + b"\0" * 1500,
        lambda f: f[:12] + b"\x86\xdd" + f[14:],
        lambda f: f[:12] + b"\x81\x00\x00\x01\x08\x00" + f[14:],  # a VLAN
        lambda f: b"",
    ],
)
def test_what_can_be_read_in_two_ways_is_dropped(spoil: Callable[[bytes], bytes]) -> None:
    rig = Rig("public")
    assert rig.send(tcp("8.8.8.8", 80, SYN)) == "passed"
    assert rig.send(spoil(tcp("8.8.8.8", 80, SYN, sport=4001))) == "dropped"
    assert rig.walls.counters.dropped == 1


def test_what_lies_behind_a_packet_is_cut_off() -> None:
    rig = Rig("public")
    frame = tcp("8.8.8.8", 80, SYN)
    assert rig.send(frame + b"padding") == "passed"
    assert rig.to_slirp == [frame]
    with pytest.raises(Malformed):
        packets.arp(frame)


def test_a_refusal_is_seen_at_once_and_right() -> None:
    rig = Rig("public")
    assert rig.send(tcp("169.254.169.254", 80, SYN, seq=0xFFFFFFFF)) == "refused"
    reset = Packet(rig.to_guest[-1])
    assert (reset.flags, reset.seq, reset.ack) == (RST | ACK, 0, 0), "seq wraps"
    assert (reset.source, reset.target_port) == (at("169.254.169.254"), 4000)
    assert packets.checksum(rig.to_guest[-1][14:34]) == 0
    pseudo = rig.to_guest[-1][26:34] + struct.pack("!HH", packets.TCP, 20)
    assert packets.checksum(pseudo + rig.to_guest[-1][34:]) == 0

    for frame in (udp("10.1.1.1", 53), echo("192.168.0.1")):
        assert rig.send(frame) == "refused"
        told = rig.to_guest[-1]
        assert told[34:36] == b"\x03\x0d", "unreachable, prohibited"
        assert packets.checksum(told[34:]) == 0
        assert told[42:] == frame[14:42], "it quotes what it refuses"
    assert rig.walls.counters.refused == 3
    assert rig.send(tcp("10.1.1.1", 80, RST)) == "dropped", "nobody answers a reset"
    assert rig.send(udp("224.0.0.251", 5353)) == "dropped", "nor what goes to all"
    assert rig.send(udp("10.0.2.255", 137)) == "dropped"


@pytest.mark.parametrize("target", ["10.0.2.2", "10.0.2.3", "10.0.2.99", "127.0.0.1", "0.0.0.0",
                                    "192.168.1.1", "8.8.4.4"])  # fmt: skip
def test_the_host_and_its_neighbours_are_refused(target: str) -> None:
    rig = Rig("public", "10.0.0.0/8", host=("8.8.4.4",))
    assert rig.send(tcp(target, 22, SYN)) == "refused"
    assert rig.send(udp(target, 123)) == "refused"


def test_the_gateway_gives_addresses_and_echoes() -> None:
    rig = Rig()
    assert rig.send(udp("255.255.255.255", 67, sport=68, source="0.0.0.0")) == "passed"
    assert rig.send(udp("10.0.2.2", 67, sport=68)) == "passed"
    assert rig.send(udp("8.8.8.8", 67, sport=68)) == "refused"
    assert rig.send(echo("10.0.2.2")) == "passed"
    arp = MACS + packets.TYPE_ARP + b"\x00\x01\x08\x00\x06\x04\x00\x01" + b"\0" * 20
    assert rig.send(arp + b"padding") == "passed"
    assert rig.to_slirp[-1] == arp
    assert rig.send(arp[:20] + b"\x00\x03" + arp[22:]) == "dropped"
    assert rig.send(udp("10.0.2.3", 53)) == "asked"
    rig.walls.answer(rig.asked[0], b"an answer")
    answer = Packet(rig.to_guest[-1])
    assert (answer.source, answer.source_port, answer.target_port) == (at("10.0.2.3"), 53, 4000)
    assert answer.payload == b"an answer"
    pseudo = answer.frame[26:34] + struct.pack("!HH", packets.UDP, 8 + 9)
    assert packets.checksum(pseudo + answer.frame[34:]) == 0


def test_only_a_guests_address_may_send() -> None:
    rig = Rig("public")
    for source in ("10.0.2.2", "10.0.2.3", "10.0.2.0", "10.0.2.255", "8.8.4.4", "127.0.0.1"):
        assert rig.send(tcp("8.8.8.8", 80, SYN, source=source)) == "dropped", source
        assert rig.send(echo("8.8.8.8", source=source)) == "dropped", source
    assert rig.send(tcp("8.8.8.8", 80, SYN, source="10.0.2.77")) == "passed"


def test_what_nobody_began_does_not_come_in() -> None:
    rig = Rig("public")
    syn = tcp("8.8.8.8", 80, SYN)
    assert not rig.receives(back(syn, SYN | ACK))
    assert rig.send(syn) == "passed"
    assert rig.receives(back(syn, SYN | ACK))
    other = tcp("8.8.8.8", 80, SYN, sport=4001)
    assert not rig.receives(back(other, SYN | ACK))
    question = udp("8.8.8.8", 123)
    reply = packets.udp_answer(Packet(question), b"time")
    assert not rig.receives(reply)
    assert rig.send(question) == "passed"
    assert rig.receives(reply)
    stranger = packets.udp_answer(Packet(udp("8.8.4.4", 123)), b"time")
    assert not rig.receives(stranger), "libslirp takes it from anybody"
    assert not rig.receives(MACS + b"\x86\xdd" + b"\0" * 60)


def test_a_connection_of_before_is_reset() -> None:
    rig = Rig("public")
    assert rig.send(tcp("8.8.8.8", 80, ACK, seq=5, ack=77)) == "refused"
    reset = Packet(rig.to_guest[-1])
    assert (reset.flags, reset.seq) == (RST, 77)


def test_a_change_ends_what_it_does_not_allow() -> None:
    rig = Rig("8.8.8.8", "1.1.1.1")
    kept, ended = tcp("8.8.8.8", 80, SYN), tcp("1.1.1.1", 80, SYN, sport=4001)
    for frame in (kept, ended):
        assert rig.send(frame) == "passed"
        assert rig.receives(back(frame, SYN | ACK, seq=7000, ack=1001))
    assert rig.send(tcp("1.1.1.1", 80, ACK, seq=1001, ack=7001, sport=4001)) == "passed"
    assert rig.send(udp("1.1.1.1", 53)) == "passed"
    passed, told = len(rig.to_slirp), len(rig.to_guest)
    rig.walls.change(policy("8.8.8.8"))
    (to_slirp,), (to_guest,) = rig.to_slirp[passed:], rig.to_guest[told:]
    ours, theirs = Packet(to_slirp), Packet(to_guest)
    assert (ours.flags, ours.seq, ours.ack) == (RST | ACK, 1001, 7001)
    assert (theirs.flags, theirs.seq, theirs.ack) == (RST | ACK, 7001, 1001)
    assert ours.key == Packet(ended).key
    assert theirs.reverse_key == ours.key
    assert rig.send(tcp("8.8.8.8", 80, ACK, seq=1001, ack=7001)) == "passed"
    assert rig.send(tcp("1.1.1.1", 80, ACK, seq=1001, ack=7001, sport=4001)) == "refused"
    assert rig.send(udp("1.1.1.1", 53)) == "refused"
    assert not rig.receives(packets.udp_answer(Packet(udp("1.1.1.1", 53)), b"late"))


def test_a_name_opens_its_address_for_a_while() -> None:
    rig = Rig("example.org:443", host=("9.9.9.9",))
    address = at("8.8.8.8")
    assert rig.send(tcp("8.8.8.8", 443, SYN)) == "refused"
    rig.walls.pin(address, "example.org", 5)
    for number in ("10.0.0.5", "9.9.9.9", "127.0.0.1"):
        rig.walls.pin(at(number), "example.org", 5)
        assert rig.send(tcp(number, 443, SYN)) == "refused", "a name opens only what is public"
    assert rig.send(tcp("8.8.8.8", 80, SYN)) == "refused"
    assert rig.send(tcp("8.8.8.8", 443, SYN)) == "passed"
    rig.now += 2 * walls.MIN_PIN + 1
    assert rig.send(tcp("8.8.8.8", 443, ACK, seq=1001)) == "passed", "what was begun goes on"
    assert rig.send(tcp("8.8.8.8", 443, SYN, sport=4001)) == "refused"
    assert rig.send(tcp("8.8.8.8", 443, SYN)) == "refused", "not even from the same port"
    rig.walls.pin(address, "example.org", 1e9)
    assert rig.send(tcp("8.8.8.8", 443, SYN)) == "passed"
    rig.walls.change(policy("example.net:443"))
    assert rig.send(tcp("8.8.8.8", 443, ACK, seq=1001)) == "refused"


def test_the_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walls, "MAX_FLOWS", 4)
    monkeypatch.setattr(walls, "MAX_PINS", 4)
    rig = Rig("public", "example.org")
    for port in range(1, 5):
        assert rig.send(tcp("8.8.8.8", 80, SYN, sport=port)) == "passed"
    assert rig.send(tcp("8.8.8.8", 80, SYN, sport=5)) == "refused"
    for flags in (FIN | ACK,):
        first = tcp("8.8.8.8", 80, flags, sport=1)
        assert rig.send(first) == "passed"
        assert rig.receives(back(first, flags))
    rig.now += walls.CLOSED_SECONDS + 1
    assert rig.send(tcp("8.8.8.8", 80, SYN, sport=5)) == "passed", "closed ones make room"
    reset = tcp("8.8.8.8", 80, SYN, sport=2)
    assert rig.receives(back(reset, RST | ACK))
    assert not rig.receives(back(reset, ACK))
    for port in range(1, 10):
        rig.now += 1
        assert rig.send(udp("8.8.8.8", 80, sport=port)) == "passed", "the oldest goes"
    assert len(rig.walls._udp) == 4
    for number in range(10):
        rig.walls.pin(number + 0x08080808, "example.org", number)
    assert len(rig.walls._pins) == 4
    assert set(rig.walls._names) == {address for address, _ in rig.walls._pins}
    rig.now += walls.UDP_SECONDS + 2 * walls.MAX_PIN
    assert rig.send(udp("8.8.8.8", 81)) == "passed"
    assert (len(rig.walls._udp), len(rig.walls._pins)) == (1, 0)


def test_what_goes_through_is_counted() -> None:
    rig = Rig("public")
    syn = tcp("8.8.8.8", 80, SYN)
    rig.send(syn)
    rig.receives(back(syn, SYN | ACK))
    counters = rig.walls.counters
    assert (counters.sent_packets, counters.sent_bytes) == (1, len(syn))
    assert (counters.received_packets, counters.received_bytes) == (1, len(syn))
    assert (counters.connections, counters.refused, counters.dropped) == (1, 0, 0)
