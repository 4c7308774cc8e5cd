"""What goes over the port that a first command goes by, as bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stratabox.daemon.hypervisor.guest import port_wire
from stratabox.daemon.hypervisor.guest.exec_heard import Output, Stream
from stratabox.daemon.hypervisor.guest.exec_wire import Ended, Flag, NotStarted, Started
from stratabox.daemon.hypervisor.guest.port_wire import (
    GREETING,
    Greeted,
    NonsenseError,
    Over,
    Taken,
    Told,
    Words,
)

TOKEN = b"0123456789abcdef" * 2


def frame(letter: str, body: bytes = b"") -> bytes:
    return letter.encode() + struct.pack("<I", len(body)) + body


def said(letter: str, *numbers: int) -> bytes:
    given = [*numbers, *[0] * (4 - len(numbers))]
    return frame("K", letter.encode() + b"".join(b"%016x" % each for each in given))


ALL = [
    (said("T", 0, 22), Told(0, 22)),
    (said("S", 7, 8), Started(7, 8)),
    (frame("O", b"a\0b"), Output(Stream.STDOUT, b"a\0b")),
    (frame("E", b"K"), Output(Stream.STDERR, b"K")),
    (frame("I", b"\5\0\0\0"), Taken(5)),
    (said("F", 4, 2), NotStarted(4, 2)),
    (said("E", 3, 0, 8, 10**9), Ended(3, 0, Flag.DISK_FULL, 1.0)),
    (frame("Z"), Over()),
]


@given(st.lists(st.integers(1, 40), min_size=1), st.binary(max_size=50))
def test_words_are_read_however_they_are_cut(sizes: list[int], stale: bytes) -> None:
    """What an earlier user has left comes before the token, and is passed over."""
    stream = GREETING + stale + TOKEN + b"".join(each for each, _ in ALL)
    words, found, at = Words(TOKEN), [], 0
    while at < len(stream):
        for size in sizes:
            found += words.feed(stream[at : at + size])
            at += size
    assert found == [word for _, word in ALL]


@given(st.binary(max_size=100), st.integers(1, 30))
def test_a_greeting_is_found_behind_what_was_left(before: bytes, size: int) -> None:
    assume(GREETING not in before)
    stream, greeted = before + GREETING, Greeted()
    heard = [greeted.feed(stream[at : at + size]) for at in range(0, len(stream), size)]
    assert heard == [False] * (len(heard) - 1) + [True]


@pytest.mark.parametrize(
    "wrong",
    [
        frame("x"),
        GREETING,
        frame("Z", b"more"),
        frame("I", b"\0"),
        frame("K", b"S"),
        frame("K", b"S" + b"x" * 64),
        frame("K", b"T" + b"x" * 64),
        frame("K", b"?" + b"0" * 64),
        b"O" + struct.pack("<I", (32 << 10) + 1),
        b"O\xff\xff\xff\xff",
    ],
)
def test_nonsense_is_told_from_words(wrong: bytes) -> None:
    words = Words(TOKEN)
    assert words.feed(TOKEN + frame("O", b"before")) == [Output(Stream.STDOUT, b"before")]
    with pytest.raises(NonsenseError):
        words.feed(wrong + b"\0" * 5)


def test_noise_without_end_is_given_up() -> None:
    for reader in (Words(TOKEN), Greeted()):
        for _ in range(port_wire.STALE_BYTES // 30_000):
            reader.feed(b"stratabox-exec\n" * 2000)
        with pytest.raises(NonsenseError):
            reader.feed(b"stratabox-exec\n" * 2000)


def test_a_guest_is_told_the_time_and_new_random_numbers_each_time() -> None:
    told, again = port_wire.opening(1_700_000_000 * 10**9), port_wire.opening(1)
    assert (len(told), told[:8]) == (16 + port_wire.SEED_BYTES, b"SBXP\0\0\0\0")
    assert struct.unpack_from("<Q", told, 8) == (1_700_000_000 * 10**9,)
    assert told[16:] != again[16:]
    assert port_wire.opening(None)[8:] == bytes(8 + port_wire.SEED_BYTES)
