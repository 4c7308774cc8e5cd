"""Reads an archive, trusting nothing in it.

Each function is a *parser*: a generator that yields how many bytes it wants next, is sent just
those, and returns what it found. So it neither knows where bytes come from nor holds more of them
than one block's; who drives it decides when, and in which thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from typing import TypeVar

from stratabox.storage.files.transfer.archive import (
    BLOCK,
    BLOCK_MARK,
    END_MARK,
    HEADER,
    PREAMBLE,
    Block,
    Digest,
    Unit,
    invalid,
    open_block,
    parse_preamble,
    trailer,
)
from stratabox.storage.files.transfer.manifest import Kind, Manifest, Member
from stratabox.storage.files.transfer.sources import units_in
from stratabox.storage.files.transfer.strict import parse
from stratabox.storage.files.transfer.targets import Target
from stratabox.storage.qcow2.clusters import ABSENT, DATA, ZERO

T = TypeVar("T")
Parser = Generator[int, bytes, T]


def read_manifest() -> Parser[tuple[Manifest, bytes]]:
    """The manifest and its SHA-256. :raise InvalidArgumentError: INVALID_ARCHIVE."""
    size, digest = parse_preamble((yield PREAMBLE.size))
    content = yield size
    if hashlib.sha256(content).digest() != digest:
        raise invalid("its manifest is damaged: its SHA-256 differs")
    return parse(content), digest


def read_member(at: int, member: Member, target: Target) -> Parser[Block]:
    """One member, into its target, which is finished and durable then; returns its end.

    :param at: its place in the manifest.
    :raise InvalidArgumentError: INVALID_ARCHIVE.
    :raise NoSpaceError: NO_SPACE.
    """
    what = f"member {at} ({member.kind})"
    digest = Digest(member.kind.unit, member.size)
    left, last = member.data, -1
    while True:
        header, stored_bytes = _header((yield HEADER.size))
        if header.mark == END_MARK:
            if header != digest.end(at) or stored_bytes:
                raise invalid(f"{what} does not end as its blocks say")
            target.finish()
            return header
        where = f"block {header.number} of {what}"
        if header.mark != BLOCK_MARK or header.member != at:
            raise invalid(f"there is no block of {what} where one must be")
        if not last < header.number < -(-member.size // BLOCK):
            raise invalid(f"{where} is out of order or lies beyond the end")
        last = header.number
        units = _check_size(header, member, where)
        if not 0 < stored_bytes <= header.raw:
            raise invalid(f"{where} has {stored_bytes} bytes for {header.raw}")
        content = memoryview(open_block(header, (yield stored_bytes), where))
        states, data = content[:units], content[units:]
        if units:
            _check_states(states.tobytes(), len(data), member, where)
        left -= len(data)
        if left < 0:
            raise invalid(f"{what} has more data than the {member.data} bytes that were declared")
        digest.add(header.sum)
        target.put(header.number, states, data)


def read_trailer(manifest: bytes, ends: Sequence[Block]) -> Parser[None]:
    """The end of the archive.

    :param manifest: its SHA-256.
    :raise InvalidArgumentError: INVALID_ARCHIVE.
    """
    header, stored_bytes = _header((yield HEADER.size))
    if header != trailer(manifest, ends) or stored_bytes:
        raise invalid("its trailer does not fit what came before")


def _header(content: bytes) -> tuple[Block, int]:
    mark, member, number, stored, raw, sum_ = HEADER.unpack(content)
    return Block(mark=mark, member=member, number=number, raw=raw, sum=sum_), stored


def _check_size(header: Block, member: Member, where: str) -> int:
    """How many states a block begins with, once its content's size is possible."""
    unit = member.kind.unit
    if unit is Unit.FILE:
        if header.raw != min(BLOCK, member.size - header.number * BLOCK):
            raise invalid(f"{where} has {header.raw} bytes of content")
        return 0
    units = units_in(member, header.number)
    if not units <= header.raw <= units + units * unit:
        raise invalid(f"{where} has {header.raw} bytes of content")
    return units


def _check_states(states: bytes, data: int, member: Member, where: str) -> None:
    counts = [states.count(state) for state in (ABSENT, ZERO, DATA)]
    if sum(counts) != len(states) or counts[ABSENT] == len(states):
        raise invalid(f"{where} has states that cannot be")
    if member.kind is Kind.RAM and counts[ZERO]:
        raise invalid(f"{where} has states that RAM does not have")
    if data != counts[DATA] * member.kind.unit:
        raise invalid(f"{where} has {data} bytes of data for {counts[DATA]} units")
