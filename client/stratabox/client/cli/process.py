"""`stratabox sandbox process`: commands that go on in guests by themselves."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Any

import click

from stratabox.client.cli import streaming
from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common
from stratabox.client.cli.output import jsonable, moment, print_json, print_table, size
from stratabox.client.process_records import ProcessEnd, ProcessRecord, ProcessSignal

_SIGNALS = click.Choice([each.value for each in ProcessSignal], case_sensitive=False)


@click.group()
def process() -> None:
    """Find what `sandbox exec -d` has started, follow it, wait for it, end it.

    What such a process prints is kept in the guest's memory, the last MiB of each. All of them end
    with a boot of the guest. A copy of its memory has them too, as inherited ones.
    """


@process.command("list")
@click.argument("sandbox")
@common
@pass_app
def list_(app: App, sandbox: str) -> None:
    """List a sandbox's detached processes, oldest first."""
    with app.client() as client:
        found = client.processes.list(sandbox)
    if app.json:
        print_json({"processes": [_as_json(each) for each in found]})
        return
    print_table(
        ("ID", "PID", "USER", "STATE", "STARTED", "PRINTED", "INHERITED", "COMMAND"),
        (_row(each) for each in found),
    )


@process.command()
@click.argument("sandbox")
@click.argument("process")
@click.option(
    "--offset", type=int, default=0, metavar="BYTES",
    help="Where to begin in what it has printed; negative: so many bytes before the end.",
)  # fmt: skip
@click.option("--no-follow", is_flag=True, help="End at what it has printed until now.")
@common
@pass_app
@click.pass_context
def attach(
    ctx: click.Context, app: App, sandbox: str, process: str, offset: int, no_follow: bool
) -> None:
    """Print what one has printed and what it prints, and exit with its code.

    Leaving leaves it alone. Where output is kept no more, stderr says how much.
    """
    end: ProcessEnd | None = None
    with app.client() as client:
        for heard in client.processes.attach(sandbox, process, offset=offset, follow=not no_follow):
            if isinstance(heard, ProcessEnd):
                end = heard
            elif heard.stream == "gap":
                app.note(f"warning: {heard.lost} bytes of output are kept no more")
            elif app.json:
                data = base64.b64encode(heard.data).decode()
                print_json({"stream": heard.stream, "base64": data, "offset": heard.offset})
            else:
                streaming.put(heard)
    _finish(ctx, app, end)


@process.command()
@click.argument("sandbox")
@click.argument("process")
@common
@pass_app
@click.pass_context
def wait(ctx: click.Context, app: App, sandbox: str, process: str) -> None:
    """Wait until one has ended, and exit with its code."""
    with app.client() as client:
        end = client.processes.wait(sandbox, process)
    _finish(ctx, app, end)


@process.command("signal")
@click.argument("sandbox")
@click.argument("process")
@click.argument("signal", type=_SIGNALS, default="TERM")
@common
@pass_app
def signal_(app: App, sandbox: str, process: str, signal: str) -> None:
    """Send one a signal (TERM); KILL goes to all that it has started."""
    with app.client() as client:
        client.processes.signal(sandbox, process, signal)
    if app.json:
        print_json({})


def _finish(ctx: click.Context, app: App, end: ProcessEnd | None) -> None:
    if end is None:
        return
    if app.json:
        print_json(jsonable(_end(end)))
    streaming.note_end(app, end)
    ctx.exit(streaming.exit_code(end))


def _end(end: ProcessEnd) -> dict[str, Any]:
    return {
        "exit_code": end.exit_code,
        "signal": end.signal,
        "timed_out": end.timed_out,
        "out_of_memory": end.out_of_memory,
        "disk_full": end.disk_full,
        "duration_seconds": end.duration.total_seconds(),
    }


def _as_json(found: ProcessRecord) -> dict[str, Any]:
    return {
        "id": found.id,
        "started_in": found.started_in,
        "inherited": found.inherited,
        "argv": [word.decode(errors="replace") for word in found.argv],
        "user": found.user,
        "pid": found.pid,
        "started_at": found.started_at.isoformat(),
        "printed_bytes": found.printed_bytes,
        "kept_from": found.kept_from,
        "end": _end(found.end) if found.end else None,
    }


def _row(found: ProcessRecord) -> tuple[str, ...]:
    return (
        found.id,
        str(found.pid),
        found.user,
        _state(found.end),
        moment(max(found.started_at, datetime.fromtimestamp(0, UTC))),
        size(found.printed_bytes),
        "yes" if found.inherited else "no",
        " ".join(word.decode(errors="replace") for word in found.argv)[:60],
    )


def _state(end: ProcessEnd | None) -> str:
    if end is None:
        return "running"
    if end.timed_out:
        return "timed out"
    return f"signal {end.signal}" if end.signal is not None else f"exited {end.exit_code}"
