"""What the keeper in a guest is asked, and what it says: bytes. Pure; see keeper_run.h."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from stratabox.daemon.hypervisor.guest.exec import DEFAULT_ENVIRONMENT
from stratabox.storage.model.errors import InvalidArgumentError

TOKEN_BYTES = 32
_NUMBERS = 4
_RECORD_BYTES = TOKEN_BYTES + 1 + 16 * _NUMBERS
_ARGUMENT_BYTES = 128 << 10
_ALL_BYTES = 2 << 20
"""Linux: one argument, and all of them with the environment."""
_MOST_MS = 1 << 52
_MOST_BYTES = (1 << 63) - 1


class Asked(IntFlag):
    """How a command is to be run."""

    INPUT = 1
    TERMINAL = 2
    DETACHED = 4
    TOLD_FIRST = 8
    """Where it is to be killed with all that it started, SIGTERM comes 5 s before that."""
    TELL_ROOM = 16
    """Say how much room the guest's root file system has and had: `Room`."""


NOTHING = Asked(0)


class Flag(IntFlag):
    """What is said of how a command ended."""

    TIMED_OUT = 1
    KILLED = 2
    OUT_OF_MEMORY = 4
    DISK_FULL = 8


class Where(IntEnum):
    """What failed, of a command that could not be started."""

    REQUEST = 1
    USER = 2
    FOLDER = 3
    PROGRAM = 4
    JOB = 5


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is to run in a guest."""

    argv: Sequence[bytes]
    env: Mapping[str, bytes]
    cwd: str = ""
    """Empty: the user's home."""
    user: str = ""
    """Name or number; empty: root."""
    timeout: float | None = None
    """Seconds of the guest's own time."""
    asked: Asked = NOTHING


@dataclass(frozen=True)
class Started:
    """It runs."""

    keeper: int
    pid: int


@dataclass(frozen=True)
class NotStarted:
    """It could not be started."""

    where: int
    error: int
    """The guest's errno."""


@dataclass(frozen=True)
class Ended:
    """It has ended. With `signal` 0 it has exited with that code."""

    code: int
    signal: int
    flags: Flag
    duration: float


@dataclass(frozen=True)
class Room:
    """Bytes of the guest's root file system, at a command's end."""

    total: int
    available: int
    """To everybody."""
    least: int
    """The least that was available while the command ran, looked at each second."""
    free: int
    """With what is reserved for root."""


Said = Started | NotStarted | Room | Ended


def new_token() -> bytes:
    """What marks the keeper's own words among the command's; nobody else can know it.

    It begins with what hardly a command prints last: that would be held back until it prints more.
    """
    return b"\x1e" + secrets.token_hex(TOKEN_BYTES // 2)[1:].encode()


def check(command: Command) -> None:
    """Refuse what no guest can run.

    :raise InvalidArgumentError: for no command at all, NUL bytes, bad names of variables, a time
        limit that is none, or more arguments than Linux takes.
    """
    if not command.argv or not command.argv[0]:
        raise InvalidArgumentError("There is no command to run.", field="argv")
    for name in command.env:
        if not name or "=" in name:
            raise InvalidArgumentError(
                f"{name!r} is no name for an environment variable.", field="env"
            )
    if command.timeout is not None and not 0 < command.timeout * 1000 < _MOST_MS:
        raise InvalidArgumentError("A time limit is a positive number of seconds.", field="timeout")
    texts = [*command.argv, *_variables(command), command.cwd.encode(), command.user.encode()]
    if any(b"\0" in text for text in texts):
        raise InvalidArgumentError("A command and its environment cannot hold NUL bytes.")
    if max(map(len, texts)) >= _ARGUMENT_BYTES:
        raise InvalidArgumentError(
            f"One argument or variable is longer than {_ARGUMENT_BYTES} bytes: write it to a file,"
            " or to the command's standard input."
        )
    if sum(map(len, texts)) + 9 * len(texts) > _ALL_BYTES:  # Linux counts the pointers too
        raise InvalidArgumentError(
            f"Arguments and environment are longer than {_ALL_BYTES} bytes together: write them to"
            " a file, or to the command's standard input."
        )


def request(command: Command, token: bytes, *, sandbox: str, job: str = "") -> bytes:
    """What the keeper reads before it starts a command that `check` has seen."""
    cwd = command.cwd if not command.cwd or command.cwd.startswith("/") else f"/{command.cwd}"
    milliseconds = 0 if command.timeout is None else max(round(command.timeout * 1000), 1)
    variables = _variables(command)
    body = b"".join(
        [
            token,
            struct.pack("<IQ", command.asked, milliseconds),
            *(text.encode() + b"\0" for text in (command.user, cwd, sandbox, job)),
            struct.pack("<I", len(command.argv)),
            *(text + b"\0" for text in command.argv),
            struct.pack("<I", len(variables)),
            *(text + b"\0" for text in variables),
        ]
    )
    return b"SBX1" + struct.pack("<I", len(body)) + body


def _variables(command: Command) -> list[bytes]:
    base = {name: DEFAULT_ENVIRONMENT[name].encode() for name in ("PATH", "LANG")}
    return [name.encode() + b"=" + value for name, value in (base | dict(command.env)).items()]


class Listener:
    """Takes the keeper's words out of what a command prints.

    A piece of the command's own is held back only while it could be the beginning of such words,
    which start with a token that was never told before.
    """

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._held = b""

    def feed(self, data: bytes) -> list[bytes | Said]:
        """What came, in order: the command's bytes, and what the keeper said among them."""
        data, found = self._held + data, list[bytes | Said]()
        self._held = b""
        while data:
            at = data.find(self._token)
            if at < 0:
                keep = self._beginning(data)
                found.append(data[: len(data) - keep])
                self._held = data[len(data) - keep :]
                break
            found.append(data[:at])
            if len(data) < at + _RECORD_BYTES:
                self._held = data[at:]
                break
            found.append(said(data[at + TOKEN_BYTES : at + _RECORD_BYTES]))
            data = data[at + _RECORD_BYTES :]
        return [each for each in found if each]

    def end(self) -> bytes:
        """What was held back, when no more comes."""
        held, self._held = self._held, b""
        return held

    def _beginning(self, data: bytes) -> int:
        """How many of the last bytes may be the token's first."""
        for size in range(min(TOKEN_BYTES - 1, len(data)), 0, -1):
            if data.endswith(self._token[:size]):
                return size
        return 0


def said(words: bytes) -> bytes | Said:
    """What the keeper says behind its token; those bytes, where it cannot have said that."""
    try:
        numbers = [int(words[at : at + 16], 16) for at in range(1, len(words), 16)]
    except ValueError:
        return words  # somebody else's, in a guest that lies
    match words[:1]:
        case b"S":
            return Started(numbers[0], numbers[1])
        case b"F":
            return NotStarted(numbers[0], numbers[1])
        case b"D":
            return Room(*(min(number, _MOST_BYTES) for number in numbers))
        case b"E":
            return Ended(
                numbers[0] & 0xFF, numbers[1] & 0x7F, Flag(numbers[2] & 15), numbers[3] / 1e9
            )
    return words
