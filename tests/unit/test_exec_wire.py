"""What goes between the daemon and the keeper in a guest, as bytes."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratabox.daemon.hypervisor.guest.exec_heard import Stream
from stratabox.daemon.hypervisor.guest.exec_wire import (
    Asked,
    Command,
    Ended,
    Flag,
    Listener,
    NotStarted,
    Started,
    check,
    new_token,
    request,
)
from stratabox.daemon.hypervisor.guest.process_wire import (
    Frames,
    Gap,
    Kept,
    NonsenseError,
    parse_list,
)
from stratabox.storage.model.errors import InvalidArgumentError

TOKEN = b"0123456789abcdef" * 2


def word(kind: str, *numbers: int) -> bytes:
    return TOKEN + kind.encode() + b"".join(b"%016x" % each for each in numbers)


def command(*argv: bytes, **env: bytes) -> Command:
    return Command(argv=argv, env=env)


@pytest.mark.parametrize(
    "wrong",
    [
        Command(argv=[], env={}),
        Command(argv=[b""], env={}),
        command(b"a\0b"),
        command(b"a", x=b"\0"),
        Command(argv=[b"a"], env={"a=b": b""}),
        Command(argv=[b"a"], env={"": b""}),
        Command(argv=[b"a"], env={}, cwd="a\0"),
        Command(argv=[b"a"], env={}, user="a\0"),
        command(b"x" * (128 << 10)),
        command(*[b"x" * 1000] * 2100),
        Command(argv=[b"a"], env={}, timeout=-1),
        Command(argv=[b"a"], env={}, timeout=float("inf")),
        Command(argv=[b"a"], env={}, timeout=float("nan")),
    ],
)
def test_what_no_guest_can_run_is_refused(wrong: Command) -> None:
    with pytest.raises(InvalidArgumentError):
        check(wrong)


def test_two_mebibytes_of_arguments_can_be_asked_for() -> None:
    many = command(*[b"x" * 10] * 100_000)
    check(many)
    asked = request(many, TOKEN, sandbox="s")
    assert asked.startswith(b"SBX1" + struct.pack("<I", len(asked) - 8) + TOKEN)


def test_a_request_says_all_of_it() -> None:
    wanted = Command(
        argv=[b"a", b"\xff"], env={"K": b"v"}, cwd="x", user="u", timeout=1.5, asked=Asked.TERMINAL
    )
    body = request(wanted, TOKEN, sandbox="s", job="j")[8:]
    assert body[32:44] == struct.pack("<IQ", 2, 1500)
    assert body[44:].startswith(b"u\0/x\0s\0j\0" + struct.pack("<I", 2) + b"a\0\xff\0")
    assert body.endswith(b"K=v\0")


def test_a_time_limit_never_becomes_none() -> None:
    body = request(Command(argv=[b"a"], env={}, timeout=1e-9), TOKEN, sandbox="")[8:]
    assert struct.unpack("<Q", body[36:44]) == (1,)


@given(st.lists(st.integers(0, 400), max_size=12))
def test_the_keepers_words_are_found_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    whole = (
        word("S", 7, 8, 0, 0) + b"one\0" + TOKEN[:20] + b"two" + word("E", 3, 9, 1, 5 * 10**8)
        + b"left behind"
    )  # fmt: skip
    listener, heard = Listener(TOKEN), list[object]()
    at = 0
    for cut in [*sorted(cuts), len(whole)]:
        heard += listener.feed(whole[at:cut])
        at = max(at, cut)
    heard.append(listener.end())
    said = [each for each in heard if not isinstance(each, bytes)]
    assert said == [Started(7, 8), Ended(3, 9, Flag.TIMED_OUT, 0.5)]
    own = b"".join(each for each in heard if isinstance(each, bytes))
    assert own == b"one\0" + TOKEN[:20] + b"two" + b"left behind"


def test_what_cannot_be_the_keepers_is_not_held_back() -> None:
    listener = Listener(TOKEN)
    assert listener.feed(b"prompt> ") == [b"prompt> "]
    assert listener.feed(b"0") == []
    assert listener.feed(b"x") == [b"0x"]


def test_words_that_make_no_sense_are_the_commands_own() -> None:
    listener = Listener(TOKEN)
    assert listener.feed(TOKEN + b"S" + b"z" * 64) == [b"S" + b"z" * 64]
    assert listener.feed(word("F", 2, 2, 0, 0)) == [NotStarted(2, 2)]


def test_tokens_are_never_the_same() -> None:
    assert len({new_token() for _ in range(100)}) == 100


def state(*, ended: bool = False, printed: int = 0) -> bytes:
    return struct.pack("<II11Q", 1, ended, 10, 11, 12, 3, 0, 4, 10**9, 0, 0, 5, printed)


def listed(name: bytes, given: bytes, **of: int) -> bytes:
    return name + state(**of) + struct.pack("<I", len(given)) + given  # type: ignore[arg-type]


def test_a_list_is_read() -> None:
    first = listed(b"a" * 16, b"root\0/\0box\0id\0sh\0-c\0\0", printed=9)
    second = listed(b"b" * 16, b"\0/\0box\0id\0cut o", ended=True)
    one, two = parse_list(first + second)
    assert (one.id, one.argv, one.user, one.pid) == ("a" * 16, (b"sh", b"-c", b""), "root", 11)
    assert (one.printed, one.kept_from, one.ended, one.started_in) == (9, 5, None, "box")
    assert (two.argv, two.user) == ((b"cut o",), "root")
    assert two.ended == Ended(3, 0, Flag.OUT_OF_MEMORY, 1.0)


@given(st.binary(max_size=400))
def test_a_list_of_a_guest_that_lies_is_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(NonsenseError):
        assert len(parse_list(data)) <= len(data)


def frame(stream: int, offset: int, data: bytes = b"") -> bytes:
    return struct.pack("<B3xIQ", stream, len(data), offset) + data


@given(st.lists(st.integers(0, 300), max_size=8))
def test_frames_are_read_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    whole = frame(3, 7) + frame(1, 10, b"out") + frame(2, 13, b"err") + frame(4, 13, state())
    frames, found = Frames(), list[object]()
    at = 0
    for cut in [*sorted(cuts), len(whole)]:
        found += frames.feed(whole[at:cut])
        at = max(at, cut)
    assert found == [
        Gap(7),
        Kept(Stream.STDOUT, b"out", 10),
        Kept(Stream.STDERR, b"err", 13),
        Ended(3, 0, Flag.OUT_OF_MEMORY, 1.0),
    ]


@pytest.mark.parametrize(
    "wrong", [frame(9, 0), frame(1, 0, b"x" * 20000), frame(4, 0, b"short"), frame(1, 1 << 63)]
)
def test_frames_of_a_guest_that_lies_are_refused(wrong: bytes) -> None:
    with pytest.raises(NonsenseError):
        list(Frames().feed(wrong))


def test_no_letter_of_a_command_is_held_back() -> None:
    for letter in map(bytes, zip(range(0x20, 0x7F), strict=False)):
        assert Listener(new_token()).feed(letter) == [letter]
