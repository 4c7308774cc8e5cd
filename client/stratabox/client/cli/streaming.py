"""A command in a guest with this process's own input, output and terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stratabox.client.cli import terminal
from stratabox.client.cli.failures import TIMED_OUT
from stratabox.client.process_records import Printed, ProcessEnd, Terminal
from stratabox.client.records import ExecuteResult

if TYPE_CHECKING:
    from stratabox.client import Client, Process
    from stratabox.client.cli.app import App

_PIECE = 64 << 10


def run(
    app: App,
    client: Client,
    sandbox: str,
    command: Sequence[str],
    *,
    interactive: bool,
    tty: bool,
    user: str | None,
    cwd: str | None,
    env: Mapping[str, str],
    timeout: float | None,
) -> int:
    """Run it to its end, and return the exit code. Leaving before that kills it."""
    shown: Terminal | bool = False
    if tty:
        columns, rows = terminal.size()
        shown = Terminal(term=os.environ.get("TERM") or Terminal.term, columns=columns, rows=rows)
    with (
        client.processes.spawn(
            sandbox,
            command,
            cwd=cwd,
            env=env,
            user=user,
            timeout=timeout,
            stdin=interactive,
            terminal=shown,
        ) as process,
        _joined(process, reads=interactive, is_terminal=tty),
    ):
        for piece in process:
            put(piece)
    assert process.end is not None
    note_end(app, process.end)
    return exit_code(process.end)


def put(piece: Printed) -> None:
    """Print what a command has printed, where it did, at once."""
    where = sys.stderr if piece.stream == "stderr" else sys.stdout
    where.buffer.write(piece.data)
    where.buffer.flush()


def note_end(app: App, end: ProcessEnd | ExecuteResult) -> None:
    """Say what the exit code does not."""
    if end.timed_out:
        app.note("error: the time was up, and the command was killed")
    if end.out_of_memory:
        app.note("error: the guest had no memory left, and its kernel killed the command")
    if end.disk_full:
        app.note("error: a disk of the guest is full")


def exit_code(end: ProcessEnd | ExecuteResult) -> int:
    """The code to exit with, as a shell's."""
    if end.timed_out:
        return TIMED_OUT
    if end.signal is not None:
        return 128 + end.signal
    return (end.exit_code or 0) & 0xFF


@contextmanager
def _joined(process: Process, *, reads: bool, is_terminal: bool) -> Iterator[None]:
    """Give it our input and our terminal's size, as they come; all is as before at the end."""
    before = signal.getsignal(signal.SIGWINCH)
    if is_terminal:
        signal.signal(signal.SIGWINCH, lambda *_: process.resize(*terminal.size()))
    try:
        with _ending_in_order(), terminal.raw(0 if reads and is_terminal else -1):
            if reads:
                # As a daemon: at the end it waits for a key that nobody will press.
                threading.Thread(target=_feed, args=(process,), daemon=True).start()
            yield
    finally:
        signal.signal(signal.SIGWINCH, before)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let what is sent to end us end us through here, so that the terminal is given back."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _feed(process: Process) -> None:
    while data := os.read(0, _PIECE):
        process.write(data)
    process.close_stdin()
