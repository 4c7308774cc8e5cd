"""The guest's name server, against a resolver of the test's own."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratabox.daemon.hypervisor.network import names, packets
from stratabox.daemon.hypervisor.network.names import Names
from stratabox.daemon.hypervisor.network.packets import Packet
from stratabox.daemon.hypervisor.network.policy import Policy
from stratabox.daemon.hypervisor.network.walls import Walls
from stratabox.storage.model.network import Rule

MACS = bytes.fromhex("52550a000203525400123456")
GUEST, SERVER = 0x0A00020F, 0x0A000203
Make = Callable[[dns.message.Message], dns.message.Message | bytes | None]


def question(wire: bytes) -> bytes:
    head = struct.pack("!HHHH", 4000, 53, 8 + len(wire), 0)
    return packets.ip_frame(MACS, packets.UDP, GUEST, SERVER, head + wire)


class Rig:
    """A guest, its walls and names, and a resolver that says what a test has it say."""

    def __init__(self, resolver: socket.socket, *rules: str, host: int = 0) -> None:
        self.resolver = resolver
        self.told: list[bytes] = []
        self.pinned: list[tuple[int, str, float]] = []
        self.walls = Walls(
            Policy([Rule.parse(rule) for rule in rules]),
            is_host=lambda address: address == host,
            clock=time.monotonic,
            to_slirp=lambda frame: None,
            to_guest=self.told.append,
            ask=lambda packet: self.names.ask(packet),
        )
        self.names = Names(self.walls, lambda address: address == host)

    def ask(self, name: str, kind: str = "A", *, edns: bool = True) -> dns.message.Message:
        """Ask as the guest does."""
        query = dns.message.make_query(name, kind)
        if edns:
            query.use_edns(0, payload=4096)
        self.walls.from_guest(question(query.to_wire()))
        return query

    def resolve(self, make: Make) -> dns.message.Message:
        """Be the resolver for one question; what it was asked."""
        self.resolver.settimeout(10)
        wire, sender = self.resolver.recvfrom(4096)
        asked = dns.message.from_wire(wire)
        made = make(asked)
        if made is not None:
            self.resolver.sendto(made if isinstance(made, bytes) else made.to_wire(), sender)
        return asked

    def turn(self) -> None:
        """One turn of the helper's loop."""
        ready, _, _ = select.select(list(self.names.descriptors()), [], [], self.names.wait())
        self.names.poll(ready)

    def answer(self) -> dns.message.Message:
        """What the guest has been told last."""
        packet = Packet(self.told[-1])
        assert (packet.source, packet.source_port) == (SERVER, 53)
        return dns.message.from_wire(packet.payload)

    def answers(
        self, name: str, make: Make, kind: str = "A", *, edns: bool = True
    ) -> dns.message.Message:
        """A whole round."""
        query = self.ask(name, kind, edns=edns)
        self.resolve(make)
        self.turn()
        answer = self.answer()
        assert query.is_response(answer)
        return answer


def saying(*records: str) -> Make:
    """A resolver that gives these records, as "name ttl type value"."""

    def make(asked: dns.message.Message) -> dns.message.Message:
        reply = dns.message.make_response(asked)
        for record in records:
            name, ttl, kind, *values = record.split()
            if kind != "A":
                values = [" ".join(values)]
            reply.answer.append(dns.rrset.from_text(name, int(ttl), "IN", kind, *values))
        return reply

    return make


@pytest.fixture
def resolver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        conf = tmp_path / "resolv.conf"
        conf.write_text("# none\nsearch lan\nnameserver 127.0.0.1\noptions edns0\n")
        monkeypatch.setattr(names, "RESOLV_CONF", conf)
        monkeypatch.setattr(names, "PORT", sock.getsockname()[1])
        monkeypatch.setattr(names, "TRY_SECONDS", 60)  # this resolver may be slow
        yield sock


Rigging = Callable[..., Rig]


@pytest.fixture
def rig(resolver: socket.socket) -> Iterator[Rigging]:
    """Makes rigs; what they wait for at the end is forgotten."""
    made: list[Rig] = []

    def make(*rules: str, host: int = 0) -> Rig:
        made.append(Rig(resolver, *rules, host=host))
        return made[-1]

    yield make
    for each in made:
        each.names.close()


def addresses(message: dns.message.Message) -> list[str]:
    return [record.address for rrset in message.answer if rrset.rdtype == 1 for record in rrset]


def test_an_allowed_name_opens_its_addresses(rig: Rigging) -> None:
    some = rig("*.example.org:443")
    syn = packets.tcp_segment(MACS, (GUEST, 4000, 0x08080808, 443), 1, 0, packets.SYN)
    some.walls.from_guest(syn)
    assert some.walls.counters.refused == 1
    answer = some.answers(
        "www.Example.org",
        saying(
            "www.example.org. 60 CNAME cdn.example.net.",
            "cdn.example.net. 60 A 8.8.8.8 8.8.4.4",
            "stray.example.net. 60 A 9.9.9.9",
        ),
    )
    assert sorted(addresses(answer)) == ["8.8.4.4", "8.8.8.8"]
    assert answer.flags & dns.flags.RA
    some.walls.from_guest(syn)
    assert some.walls.counters.connections == 1
    assert not some.walls._names.get(0x09090909), "what was not asked for is not believed"


def test_a_name_that_points_inwards_opens_nothing(rig: Rigging) -> None:
    some = rig("example.org", "10.1.0.0/16", host=0x08080404)
    inner = "10.0.0.1 10.1.2.3 127.0.0.1 169.254.169.254 192.168.0.1 0.0.0.0 8.8.4.4 8.8.8.8"
    answer = some.answers("example.org", saying(f"example.org. 60 A {inner}"))
    assert sorted(addresses(answer)) == ["10.1.2.3", "8.8.4.4", "8.8.8.8"]
    # The host's own is told, as it is public, and still not open.
    assert set(some.walls._names) == {0x08080808, 0x0A010203}
    assert some.walls.counters.names_refused == 5


def test_what_is_not_allowed_is_asked_nobody(rig: Rigging) -> None:
    some = rig("example.org", "10.0.0.0/8")
    query = some.ask("secret.evil.com")
    answer = some.answer()
    assert query.is_response(answer)
    assert answer.rcode() == dns.rcode.NXDOMAIN
    (told,) = answer.options
    assert isinstance(told, dns.edns.EDEOption)
    assert told.code == dns.edns.EDECode.PROHIBITED
    assert some.names.descriptors() == {}
    assert some.walls.counters.names_refused == 1
    # Of what would lead nowhere there is none.
    for kind in ("AAAA", "HTTPS", "ANY", "AXFR"):
        some.ask("example.org", kind)
        assert some.answer().rcode() == dns.rcode.NOERROR
        assert some.answer().answer == []
        assert some.names.descriptors() == {}


def test_other_kinds_and_the_resolvers_no_come_through(rig: Rigging) -> None:
    some = rig("public")
    answer = some.answers("example.org", saying("example.org. 60 MX 10 mail.example.org."), "MX")
    assert answer.answer[0].to_text() == "example.org. 60 IN MX 10 mail.example.org."

    def none(asked: dns.message.Message) -> dns.message.Message:
        reply = dns.message.make_response(asked)
        reply.set_rcode(dns.rcode.NXDOMAIN)
        return reply

    assert some.answers("no.example.org", none).rcode() == dns.rcode.NXDOMAIN
    assert some.walls._pins == {}, "with everything public open there is nothing to open"


def test_a_large_answer_is_given_in_part(rig: Rigging) -> None:
    some = rig("public")
    many = " ".join(f"8.8.{number}.1" for number in range(200))
    for edns, limit in ((True, 1232), (False, 512)):
        answer = some.answers("example.org", saying(f"example.org. 60 A {many}"), edns=edns)
        assert 10 < len(addresses(answer)) < 200
        assert len(Packet(some.told[-1]).payload) <= limit
        assert not answer.flags & dns.flags.TC
    text = "example.org. 60 TXT " + "x" * 250
    answer = some.answers("example.org", saying(text), "TXT")
    assert len(answer.answer) == 1


def test_only_the_right_answer_counts(resolver: socket.socket, rig: Rigging) -> None:
    some = rig("public")
    some.ask("example.org")
    wire, sender = resolver.recvfrom(4096)
    asked = dns.message.from_wire(wire)
    good = saying("example.org. 60 A 8.8.8.8")(asked)
    assert isinstance(good, dns.message.Message)
    other_id = dns.message.from_wire(good.to_wire())
    other_id.id ^= 1
    other_name = dns.message.make_response(dns.message.make_query("evil.org", "A", id=asked.id))
    for wrong in (b"", b"\0", other_id.to_wire(), other_name.to_wire(), good.to_wire()[:-3]):
        resolver.sendto(wrong, sender)
        some.turn()
        assert some.told == []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(good.to_wire(), sender)
    resolver.sendto(good.to_wire(), sender)
    some.turn()
    assert addresses(some.answer()) == ["8.8.8.8"]


def test_a_silent_resolver_is_left_for_the_next(
    resolver: socket.socket, rig: Rigging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "TRY_SECONDS", 0)
    some = rig("public")
    some.ask("example.org")
    for _ in range(names.TRIES):
        assert some.told == []
        resolver.recvfrom(4096)
        some.turn()
    assert some.answer().rcode() == dns.rcode.SERVFAIL
    assert some.names.descriptors() == {}
    # The right one after some silence.
    some.ask("example.org")
    resolver.recvfrom(4096)
    monkeypatch.setattr(names, "TRY_SECONDS", 60)
    some.turn()
    some.resolve(saying("example.org. 60 A 8.8.8.8"))
    some.turn()
    assert addresses(some.answer()) == ["8.8.8.8"]


def test_an_answer_that_is_there_is_not_late(rig: Rigging, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is up when the helper, on a busy host, comes to look for it."""
    monkeypatch.setattr(names, "TRY_SECONDS", 0)
    some = rig("public")
    some.ask("example.org")
    some.resolve(saying("example.org. 60 A 8.8.8.8"))
    assert select.select(list(some.names.descriptors()), [], [], 60)[0]
    some.turn()
    assert addresses(some.answer()) == ["8.8.8.8"]


def test_a_resolver_that_fails_is_left_for_the_next(rig: Rigging) -> None:
    some = rig("public")

    def fails(asked: dns.message.Message) -> dns.message.Message:
        reply = dns.message.make_response(asked)
        reply.set_rcode(dns.rcode.REFUSED)
        return reply

    some.ask("example.org")
    for _ in range(names.TRIES):
        assert some.told == []
        some.resolve(fails)
        some.turn()
    assert some.answer().rcode() == dns.rcode.REFUSED


def test_a_change_of_policy_counts_for_what_was_asked(rig: Rigging) -> None:
    some = rig("example.org")
    some.ask("example.org")
    some.walls.change(Policy([Rule.parse("example.net")]))
    some.resolve(saying("example.org. 60 A 8.8.8.8"))
    some.turn()
    assert some.answer().rcode() == dns.rcode.NXDOMAIN
    assert some.walls._pins == {}


def test_questions_are_bounded(rig: Rigging) -> None:
    some = rig("public")
    for number in range(names.MAX_PENDING):
        some.ask(f"h{number}.org")
    assert some.told == []
    some.ask("one.more.org")
    assert some.answer().rcode() == dns.rcode.SERVFAIL
    assert len(some.names.descriptors()) == names.MAX_PENDING
    some.names.close()
    assert some.names.descriptors() == {}


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_no_question_breaks_it(wire: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        rig = Rig(unused)
        rig.walls.from_guest(question(wire))
        assert rig.names.descriptors() == {}, "nothing is allowed, so nothing is asked"


def test_the_host_s_resolvers() -> None:
    text = "nameserver 1.1.1.1\n;nameserver 2.2.2.2\nnameserver\n nameserver ::1 x\n"
    text += "nameserver 3\nnameserver 4"
    assert names.resolvers(text) == ["1.1.1.1", "::1", "3"]
