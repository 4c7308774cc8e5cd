"""The guest's name server, at 10.0.2.3: asks the host's resolvers for the names that are allowed.

A name that the policy does not let the guest ask for does not exist (NXDOMAIN, with the reason as
an extended error), and nothing is asked outside. Of an answer the guest gets the addresses that it
could reach; what an allowed name stands for becomes reachable by it, but for addresses that are
guarded, closed or the host's own: whoever owns a domain must not open this network with it. Only A
records lead anywhere, since IPv6 is not routed: other addresses are left out.

Over UDP only. An answer that does not fit is given without some of its addresses.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from stratabox.daemon.hypervisor.network.packets import Packet
from stratabox.daemon.hypervisor.network.walls import Walls

RESOLV_CONF = Path("/etc/resolv.conf")
PORT = 53
MAX_PENDING = 64
TRY_SECONDS = 2.0
"""For one resolver to answer in; then the next one is asked."""
TRIES = 4
_PAYLOAD = 4096
"""Bytes that a resolver may answer with."""
_ANSWER_MAX, _PLAIN_MAX = 1232, 512
_MAX_ALIASES = 16
_RESOLV_CONF_MAX = 65536
_MAX_SERVERS = 3

_PASSED = {
    dns.rdatatype.A,
    dns.rdatatype.CNAME,
    dns.rdatatype.MX,
    dns.rdatatype.NS,
    dns.rdatatype.PTR,
    dns.rdatatype.SOA,
    dns.rdatatype.SRV,
    dns.rdatatype.TXT,
    dns.rdatatype.CAA,
}
"""Types that resolvers are asked for; of others there are none."""

Message = dns.message.Message


class _Pending:
    """A question that a resolver has been asked."""

    def __init__(self, packet: Packet, query: Message, name: str) -> None:
        self.packet = packet
        self.query = query
        self.name = name
        self.asked: Message | None = None
        self.tries = 0
        self.until = 0.0


class Names:
    """Answers the questions of one guest.

    :param walls: whose policy it holds to, and whom it tells what names stand for.
    :param is_host: tells whether an address is one of this host's own.
    """

    def __init__(self, walls: Walls, is_host: Callable[[int], bool]) -> None:
        self._walls = walls
        self._is_host = is_host
        self._pending: dict[socket.socket, _Pending] = {}
        self._by_descriptor: dict[int, socket.socket] = {}
        self._servers: Sequence[str] = ()
        self._read = (-1, -1)
        for kind in _PASSED | {dns.rdatatype.AAAA, dns.rdatatype.OPT}:
            # dnspython finds its types by name, at a time when this process may read no file.
            dns.rdata.get_rdata_class(dns.rdataclass.IN, kind)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Forget all questions."""
        for waiting in list(self._pending):
            self._drop(waiting)

    def ask(self, packet: Packet) -> None:
        """Take a question of the guest's; it is answered now or later, or the guest asks again."""
        try:
            query = dns.message.from_wire(packet.payload)
        except (dns.exception.DNSException, ValueError):
            self._walls.counters.dropped += 1
            return
        if query.flags & dns.flags.QR or len(query.question) != 1:
            self._walls.counters.dropped += 1
            return
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        if query.opcode() != dns.opcode.QUERY or question.rdclass != dns.rdataclass.IN:
            self._reply(packet, query, dns.rcode.NOTIMP)
        elif not self._walls.policy.answers(name):
            self._walls.counters.names_refused += 1
            self._reply(packet, query, dns.rcode.NXDOMAIN, why="not allowed by the network policy")
        elif question.rdtype not in _PASSED:
            self._reply(packet, query, dns.rcode.NOERROR)
        elif len(self._pending) >= MAX_PENDING:
            self._reply(packet, query, dns.rcode.SERVFAIL, why="too many questions at once")
        else:
            self._send(_Pending(packet, query, name))

    def descriptors(self) -> dict[int, int]:
        """What to poll for."""
        return dict.fromkeys(self._by_descriptor, select.POLLIN)

    def wait(self) -> float | None:
        """Seconds until `poll` has something to do all the same; None: nothing is waited for."""
        if not self._pending:
            return None
        soonest = min(each.until for each in self._pending.values())
        return max(0.0, soonest - time.monotonic())

    def poll(self, ready: Iterable[int]) -> None:
        """Take what resolvers have sent, then ask the next one where one was silent too long.

        In this order: an answer that is there is not late, however late it is looked for.
        """
        for descriptor in ready:
            self._take(descriptor)
        now = time.monotonic()
        for waiting, pending in list(self._pending.items()):
            if pending.until <= now:
                self._drop(waiting)
                self._send(pending)

    def _take(self, descriptor: int) -> None:
        waiting = self._by_descriptor.get(descriptor)
        if waiting is None:
            return
        pending = self._pending[waiting]
        try:
            wire = waiting.recv(_PAYLOAD)
            reply = dns.message.from_wire(wire, ignore_trailing=True)
        except BlockingIOError:
            return
        except OSError:  # nobody listens there
            self._drop(waiting)
            self._send(pending)
            return
        except (dns.exception.DNSException, ValueError):
            return  # and the right answer may still come
        if pending.asked is None or not pending.asked.is_response(reply):
            return
        self._drop(waiting)
        if reply.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            self._pass_on(pending, reply)
        else:
            self._send(pending, last=reply.rcode())

    def _send(self, pending: _Pending, last: dns.rcode.Rcode = dns.rcode.SERVFAIL) -> None:
        """Ask the next resolver; when all were asked, say so."""
        servers = self._resolvers()
        while pending.tries < max(TRIES, len(servers)):
            server = servers[pending.tries % len(servers)]
            pending.tries += 1
            question = pending.query.question[0]
            pending.asked = dns.message.make_query(
                question.name, question.rdtype, use_edns=0, payload=_PAYLOAD
            )
            family = socket.AF_INET6 if ":" in server else socket.AF_INET
            try:
                # A socket of its own, so that its port is one more thing to guess.
                waiting = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            except OSError:
                break
            try:
                waiting.connect((server, PORT))
                waiting.send(pending.asked.to_wire())
            except OSError:
                waiting.close()
                continue
            pending.until = time.monotonic() + TRY_SECONDS
            self._pending[waiting] = pending
            self._by_descriptor[waiting.fileno()] = waiting
            return
        self._reply(pending.packet, pending.query, last, why="no resolver of the host answers")

    def _drop(self, waiting: socket.socket) -> None:
        del self._by_descriptor[waiting.fileno()]
        del self._pending[waiting]
        waiting.close()

    def _pass_on(self, pending: _Pending, reply: Message) -> None:
        if not self._walls.policy.answers(pending.name):  # it was changed meanwhile
            self._reply(pending.packet, pending.query, dns.rcode.NXDOMAIN)
            return
        wanted = pending.query.question[0]
        owner, kept = wanted.name, []
        rrsets = {(each.name, each.rdtype): each for each in reply.answer}
        for _ in range(_MAX_ALIASES):
            alias = rrsets.get((owner, dns.rdatatype.CNAME))
            if alias is None or wanted.rdtype == dns.rdatatype.CNAME:
                break
            kept.append(alias)
            owner = alias[0].target
        found = rrsets.get((owner, wanted.rdtype))
        if found is not None and found.rdtype == dns.rdatatype.A:
            found = self._reachable(found, pending.name)
        if found is not None:
            kept.append(found)
        self._reply(pending.packet, pending.query, reply.rcode(), kept)

    def _reachable(self, found: dns.rrset.RRset, name: str) -> dns.rrset.RRset | None:
        """The addresses of an answer that may be known, now reachable where the name is allowed."""
        walls = self._walls
        kept = dns.rrset.RRset(found.name, found.rdclass, found.rdtype)
        kept.update_ttl(found.ttl)
        for record in found:
            address = int.from_bytes(socket.inet_aton(record.address), "big")
            if not walls.policy.opens(address):
                walls.counters.names_refused += 1
                continue
            kept.add(record)
            if walls.policy.pins(name) and not self._is_host(address):
                walls.pin(address, name, found.ttl)
        return kept or None

    def _reply(
        self,
        packet: Packet,
        query: Message,
        code: dns.rcode.Rcode,
        answer: Sequence[dns.rrset.RRset] = (),
        why: str = "",
    ) -> None:
        reply = dns.message.make_response(query, recursion_available=True)
        reply.set_rcode(code)
        limit = _PLAIN_MAX
        if query.edns >= 0:
            limit = max(_PLAIN_MAX, min(query.payload, _ANSWER_MAX))
            prohibited = dns.edns.EDEOption(dns.edns.EDECode.PROHIBITED, why)
            reply.use_edns(0, payload=_ANSWER_MAX, options=[prohibited] if why else None)
        reply.answer = list(answer)
        wire = _fitting(reply, limit)
        if wire is not None:
            self._walls.answer(packet, wire)

    def _resolvers(self) -> Sequence[str]:
        """The host's, as its resolv.conf has them now."""
        with contextlib.suppress(OSError):
            status = RESOLV_CONF.stat()
            if (status.st_mtime_ns, status.st_ino) != self._read:
                with RESOLV_CONF.open(errors="replace") as file:
                    self._servers = resolvers(file.read(_RESOLV_CONF_MAX))
                self._read = (status.st_mtime_ns, status.st_ino)
        return self._servers or ("127.0.0.1",)


def resolvers(text: str) -> list[str]:
    """The name servers that a resolv.conf names, as the C library reads it."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            found.append(words[1])
    return found[:_MAX_SERVERS]


def _fitting(reply: Message, limit: int) -> bytes | None:
    """The answer in so many bytes: without some of its last records, where it must be."""
    while True:
        try:
            return reply.to_wire(max_size=limit)
        except dns.exception.TooBig:
            if not reply.answer:
                return None
        last = reply.answer[-1]
        if len(last) <= 1:
            reply.answer.pop()
            reply.flags |= dns.flags.TC
            continue
        kept = dns.rrset.RRset(last.name, last.rdclass, last.rdtype)
        kept.update_ttl(last.ttl)
        for record in list(last)[: len(last) // 2]:
            kept.add(record)
        reply.answer[-1] = kept
