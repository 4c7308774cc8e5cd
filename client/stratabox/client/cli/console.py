"""`stratabox sandbox console`: a guest's serial console."""

from __future__ import annotations

import base64
import codecs
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import Protocol

import click

from stratabox.client.cli import terminal
from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common, sandbox_argument
from stratabox.client.cli.output import print_json, printable
from stratabox.client.errors import StrataboxError
from stratabox.client.observed_records import ConsoleOutput

DETACH = b"\x1d"
"""^], as telnet and virsh have it."""
_KEYS = 4096

# A session of its own, whose terminal the console is; it stays until it is left by exit. Not put
# in the background by "&", by which shells have ^C ignored for good, but by setsid: the inner one
# leads a group, so it forks and does not wait. The terminal is opened by a process that leads no
# session, or it would be that one's, and be hung up at its end.
_SHELL = (
    "stty -F /dev/ttyS0 sane cols {} rows {}; "
    "(exec </dev/ttyS0 >/dev/ttyS0 2>&1; "
    "setsid sh -c \"exec setsid -c /bin/sh -c 'cd; exec sh -il'\"); :"
)


class Console(Protocol):
    """What the client has for a sandbox's console."""

    def write_console(self, data: bytes | str) -> None:
        """Type something."""


class Escaper:
    """Turns a guest's bytes into text that is harmless to a terminal, piece by piece.

    Lines and tabs are kept; every other control character, and what turns text around, is written
    out.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = ""

    def take(self, data: bytes, *, final: bool = False) -> str:
        """Return the text of the next bytes."""
        text = self._held + self._decoder.decode(data, final)
        # A \\r may be the first half of the end of a line.
        self._held = "\r" if text.endswith("\r") and not final else ""
        if self._held:
            text = text[:-1]
        lines = text.replace("\r\n", "\n").split("\n")
        return "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines)


@click.command()
@sandbox_argument
@click.option("--log", "as_log", is_flag=True, help="Print what is kept of it, and end.")
@click.option("--follow", is_flag=True, help="With --log: go on with what comes.")
@click.option("--raw", is_flag=True, help="With --log: the guest's bytes, escaping nothing.")
@click.option("--shell", is_flag=True, help="Start a shell of root's on it first.")
@common
@pass_app
def console(app: App, sandbox: str, as_log: bool, follow: bool, raw: bool, shell: bool) -> None:
    """Attach to a guest's serial console, or print what it said there.

    ^] detaches; every other key goes to the guest. What it writes comes out as it is when attached,
    and with --log with its control characters escaped.
    """
    if (follow or raw) and not as_log:
        raise click.UsageError("--follow and --raw go with --log.")
    if shell and as_log:
        raise click.UsageError("--shell attaches: it does not go with --log.")
    if app.json and (not as_log or follow):
        raise click.UsageError("--json goes with --log, and not with --follow.")
    with app.client() as client:
        if not as_log:
            record = client.sandboxes.get(sandbox)
            if shell:
                columns, rows = terminal.size()
                record.execute(_SHELL.format(columns, rows)).check()
            _attach(app, record, record.watch_console())
            return
        if follow:
            _follow(client.sandboxes.watch_console(sandbox, from_log=True), raw)
            return
        kept = client.sandboxes.console_log(sandbox)
    if app.json:
        print_json({"log": kept.decode(errors="replace"), "log_base64": _base64(kept)})
    elif raw:
        terminal.write(kept)
    else:
        click.echo(Escaper().take(kept, final=True), nl=False)


def _base64(data: bytes) -> str | None:
    try:
        data.decode()
    except UnicodeDecodeError:
        return base64.b64encode(data).decode()
    return None


def _follow(output: Iterator[ConsoleOutput], raw: bool) -> None:
    escaper = Escaper()
    for each in output:
        if each.lost_bytes:
            click.echo(_lost(each.lost_bytes), err=True)
        if raw:
            terminal.write(each.data)
        else:
            click.echo(escaper.take(each.data), nl=False)
            sys.stdout.flush()
    click.echo(escaper.take(b"", final=True), nl=False)


def _lost(count: int) -> str:
    return f"[{count} bytes were lost: this terminal was too slow]"


def _attach(app: App, sandbox: Console, output: Iterator[ConsoleOutput]) -> None:
    """Keys in, bytes out, until ^], the guest's end, or an error."""
    next(output)  # the first says that nothing is missed from here on
    stdin = sys.stdin.fileno()
    app.note("attached; ^] detaches")
    failed: list[StrataboxError] = []
    over, ended = os.pipe()

    def show() -> None:
        try:
            for each in output:
                if each.lost_bytes:
                    terminal.write(f"\r\n{_lost(each.lost_bytes)}\r\n".encode())
                terminal.write(each.data)
        except StrataboxError as error:
            failed.append(error)
        finally:
            os.close(ended)

    # A daemon: one that waits for the guest must not hold up the end of the program.
    threading.Thread(target=show, name="console", daemon=True).start()
    try:
        with terminal.raw(stdin):
            detached = _type(sandbox, stdin, over)
    finally:
        os.close(over)
    click.echo(err=True)
    if failed:
        raise failed[0]
    app.note("detached" if detached else "the guest's process has ended")


def _type(sandbox: Console, stdin: int, over: int) -> bool:
    """Type what comes from stdin; True when the user detached, False at the console's end."""
    waits = [stdin, over]
    while True:
        ready, _, _ = select.select(waits, [], [])
        if over in ready:
            return False
        keys = os.read(stdin, _KEYS)
        if not keys:  # a pipe that ended: there is only output left
            waits.remove(stdin)
            continue
        typed, detach, _ = keys.partition(DETACH)
        if typed:
            sandbox.write_console(typed)
        if detach:
            return True
