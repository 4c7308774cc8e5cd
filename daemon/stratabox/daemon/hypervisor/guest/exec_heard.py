"""What is heard of a command in a guest, whichever way it goes: its words, and who takes them.

`ExecStream` is what callers know; `exec_stream` goes over the channel, `exec_port` over a port of
its own. `Hearing` is what both keep between the guest and the caller.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from stratabox.daemon.hypervisor.guest.exec_wire import Ended, NotStarted, Room, Started
from stratabox.daemon.hypervisor.guest.gathering import PIECE, Gathering
from stratabox.storage.model.errors import UnavailableError


class Stream(Enum):
    """Where output comes from."""

    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True)
class Output:
    """What a command has printed."""

    stream: Stream
    data: bytes


@dataclass(frozen=True)
class Terminal:
    """What a command is shown on."""

    term: str = "xterm-256color"
    columns: int = 80
    rows: int = 24


Heard = Output | Started | NotStarted | Room | Ended


class LostError(UnavailableError):
    """The way ended before the command did, which is killed. CONNECTION_LOST."""

    default_reason = "CONNECTION_LOST"


class ExecStream(Protocol):
    """A command that runs, or has; to be closed. One task may iterate while another writes."""

    def __aiter__(self) -> AsyncIterator[Heard]:
        """What is heard, in order: `Started` first, `Ended` last; or `NotStarted`, and no more.

        :raise UnavailableError: CONNECTION_LOST.
        """
        ...

    async def write(self, data: bytes) -> None:
        """Give the command input; waits while it takes none. After its end nothing happens."""

    def end_of_input(self) -> None:
        """Its standard input ends here. On a terminal nothing does: a ^D is what says so there."""

    def resize(self, columns: int, rows: int) -> None:
        """Its terminal has another size; nothing happens without one."""

    async def signal(self, number: signal.Signals) -> None:
        """Send a signal to its process group; KILL to all that it started. Waits for its start.

        :raise UnavailableError: CONNECTION_LOST.
        """

    async def close(self) -> None:
        """Let go of it; a command that runs is killed by its keeper, which sees that."""


class Hearing:
    """What was heard and is not taken yet.

    :param taken: called with the size of each piece of output that its reader takes.
    """

    def __init__(self, taken: Callable[[int], None]) -> None:
        self.started = asyncio.Event()
        """It has, or never will."""
        self.said_started: Started | None = None
        self.size = 0
        """Bytes of output that wait to be taken."""
        self._taken = taken
        self._waiting: deque[Heard] = deque()
        self._changed = asyncio.Event()
        self._gathering = Gathering()
        self._closed = False

    def take(self, heard: Heard) -> None:
        """It was heard."""
        if isinstance(heard, Started):
            self.said_started = heard
            self.started.set()
        if isinstance(heard, Output):
            self.size += len(heard.data)
            self._gathering.grew(self.size)
        elif isinstance(heard, Ended):
            self._gathering.end()
        self._waiting.append(heard)
        self._changed.set()

    def end(self) -> None:
        """Nothing comes any more, or nobody wants it."""
        self._closed = True
        self._changed.set()
        self._gathering.end()
        self.started.set()

    async def heard(self) -> AsyncIterator[Heard]:
        """All of it, in order, until `end`."""
        while True:
            while self._waiting:
                if isinstance(self._waiting[0], Output):
                    await self._gathering.more(self.size)
                heard = self._waiting.popleft()
                if isinstance(heard, Output):
                    heard = self._more_of(heard)
                    self.size -= len(heard.data)
                    self._taken(len(heard.data))
                yield heard
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()

    def _more_of(self, first: Output) -> Output:
        """As much of one stream as waits in a row: fewer and larger messages."""
        pieces, size = [first.data], len(first.data)
        while self._waiting:
            then = self._waiting[0]
            if not isinstance(then, Output) or then.stream is not first.stream:
                break
            if size + len(then.data) > PIECE:
                break
            pieces.append(then.data)
            size += len(then.data)
            self._waiting.popleft()
        return Output(first.stream, b"".join(pieces)) if len(pieces) > 1 else first
