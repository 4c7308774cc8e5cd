"""Frames of the guest's network: read strictly, and the few that we write ourselves. Pure.

What is read here must be what libslirp reads later. So anything that leaves room for two readings
(IP options, fragments, lengths that do not fit) is no packet at all, and what lies behind a
packet's own length is cut off.
"""

from __future__ import annotations

import struct

ETHER = 14
IP = 20
"""Bytes of an IP header: none with options is read."""
ARP_FRAME = 42
MAX_FRAME = 1514

TYPE_IP = b"\x08\x00"
TYPE_ARP = b"\x08\x06"

ICMP, TCP, UDP = 1, 6, 17

FIN, SYN, RST, ACK = 1, 2, 4, 16

_PROHIBITED = 13
"""ICMP's code: communication is administratively prohibited."""
_IP_HEADER = struct.Struct("!BBHHHBBHII")
_TCP_START = struct.Struct("!HHIIH")
_FRAGMENT = 0xBFFF
"""All of the field but "don't fragment"."""
_ARP_OF_IP = b"\x00\x01\x08\x00\x06\x04"


class Malformed(Exception):  # noqa: N818 - the packet is; nothing of ours failed
    """A frame that is none that we pass on."""


class Packet:
    """An IPv4 packet of ICMP, TCP or UDP, whole and without options.

    :raise Malformed: when it is not.
    """

    __slots__ = ("ack", "flags", "frame", "length", "protocol", "seq", "size", "source", "target")

    def __init__(self, frame: bytes) -> None:
        if len(frame) < ETHER + IP or len(frame) > MAX_FRAME:
            raise Malformed
        start, _, size, _, fragment, _, protocol, _, source, target = _IP_HEADER.unpack_from(
            frame, ETHER
        )
        if start != 0x45 or fragment & _FRAGMENT or not IP <= size <= len(frame) - ETHER:
            raise Malformed
        self.frame = frame if len(frame) == ETHER + size else frame[: ETHER + size]
        self.protocol: int = protocol
        self.source: int = source
        self.target: int = target
        self.size: int = size
        """Of the IP packet."""
        if protocol == TCP:
            if size < IP + 20:
                raise Malformed
            _, _, self.seq, self.ack, rest = _TCP_START.unpack_from(frame, ETHER + IP)
            header = (rest >> 12) * 4
            if not 20 <= header <= size - IP:
                raise Malformed
            self.flags: int = rest & 0x3F
            self.length: int = size - IP - header
            """Of what it carries."""
        elif protocol == UDP:
            if size < IP + 8 or int.from_bytes(frame[38:40], "big") != size - IP:
                raise Malformed
        elif protocol != ICMP or size < IP + 8:
            raise Malformed

    @property
    def source_port(self) -> int:
        """Of TCP and UDP."""
        return int.from_bytes(self.frame[34:36], "big")

    @property
    def target_port(self) -> int:
        """Of TCP and UDP."""
        return int.from_bytes(self.frame[36:38], "big")

    @property
    def key(self) -> bytes:
        """Both addresses and both ports, as one that the guest sends has them."""
        return self.frame[26:38]

    @property
    def reverse_key(self) -> bytes:
        """The key of the guest's packets that this one answers."""
        frame = self.frame
        return frame[30:34] + frame[26:30] + frame[36:38] + frame[34:36]

    @property
    def payload(self) -> bytes:
        """What a UDP packet carries."""
        return self.frame[42:]


def arp(frame: bytes) -> bytes:
    """An ARP frame for IPv4 over Ethernet, cut to its length. :raise Malformed: when it is not."""
    if (
        len(frame) < ARP_FRAME
        or frame[14:20] != _ARP_OF_IP
        or frame[20:22]
        not in (
            b"\x00\x01",
            b"\x00\x02",
        )
    ):
        raise Malformed
    return frame[:ARP_FRAME]


def checksum(data: bytes, start: int = 0) -> int:
    """The checksum of IP and its kin."""
    if len(data) % 2:
        data += b"\0"
    total: int = start + sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip_frame(macs: bytes, protocol: int, source: int, target: int, payload: bytes) -> bytes:
    """A frame with one IP packet.

    :param macs: receiver's address, then sender's.
    """
    head = _IP_HEADER.pack(0x45, 0, IP + len(payload), 0, 0x4000, 64, protocol, 0, source, target)
    head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
    return macs + TYPE_IP + head + payload


def tcp_segment(
    macs: bytes, ends: tuple[int, int, int, int], seq: int, ack: int, flags: int
) -> bytes:
    """A TCP segment without anything in it.

    :param ends: source, its port, target, its port.
    """
    source, source_port, target, target_port = ends
    head = struct.pack("!HHIIBBHHH", source_port, target_port, seq, ack, 0x50, flags, 0, 0, 0)
    pseudo = struct.pack("!IIHH", source, target, TCP, len(head))
    head = head[:16] + checksum(pseudo + head).to_bytes(2, "big") + head[18:]
    return ip_frame(macs, TCP, source, target, head)


def udp_answer(packet: Packet, payload: bytes) -> bytes:
    """The frame that answers a UDP packet."""
    head = struct.pack("!HHHH", packet.target_port, packet.source_port, 8 + len(payload), 0)
    pseudo = struct.pack("!IIHH", packet.target, packet.source, UDP, 8 + len(payload))
    sum_ = checksum(pseudo + head + payload) or 0xFFFF
    head = head[:6] + sum_.to_bytes(2, "big")
    return ip_frame(back(packet), UDP, packet.target, packet.source, head + payload)


def refusal(packet: Packet) -> bytes | None:
    """What tells the sender at once that nobody is there for it; None where nothing can be said."""
    if packet.protocol == TCP:
        if packet.flags & RST:
            return None
        ends = (packet.target, packet.target_port, packet.source, packet.source_port)
        if packet.flags & ACK:
            return tcp_segment(back(packet), ends, packet.ack, 0, RST)
        used = packet.length + bool(packet.flags & SYN) + bool(packet.flags & FIN)
        return tcp_segment(back(packet), ends, 0, packet.seq + used & 0xFFFFFFFF, RST | ACK)
    if packet.protocol == ICMP and packet.frame[34] != 8:
        return None  # errors are never told of errors
    quoted = packet.frame[ETHER : ETHER + IP + 8]
    body = bytes((3, _PROHIBITED, 0, 0, 0, 0, 0, 0)) + quoted
    body = body[:2] + checksum(body).to_bytes(2, "big") + body[4:]
    return ip_frame(back(packet), ICMP, packet.target, packet.source, body)


def back(packet: Packet) -> bytes:
    """Both hardware addresses of a frame, for one that goes back."""
    return packet.frame[6:12] + packet.frame[:6]
