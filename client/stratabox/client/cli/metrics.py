"""`stratabox sandbox metrics` and `stratabox sandbox top`: what sandboxes use of the host."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import DURATION, common, sandbox_argument
from stratabox.client.cli.output import (
    jsonable,
    moment,
    print_details,
    print_json,
    print_table,
    printable,
    size,
)
from stratabox.client.observed_records import Metrics, SandboxMetrics

if TYPE_CHECKING:
    from rich.table import Table

_HEADER = (
    "NAME", "STATE", "CPU", "MEMORY", "RSS", "PRIVATE", "READ/S", "WRITE/S", "NET IN/S",
    "NET OUT/S", "DISK", "UPTIME", "ID",
)  # fmt: skip


@click.command()
@sandbox_argument
@common
@pass_app
def metrics(app: App, sandbox: str) -> None:
    """Print what one sandbox uses: CPU, memory, disks, network."""
    with app.client() as client:
        found = client.sandboxes.metrics(sandbox)
    (print_json if app.json else print_details)(found)


@click.command()
@click.argument("sandboxes", nargs=-1, metavar="[SANDBOX]...")
@click.option("--once", is_flag=True, help="Print it once, and end.")
@click.option(
    "--interval", type=DURATION, default=2.0, metavar="DURATION", help="As 500ms or 10s; 2s."
)
@common
@pass_app
def top(app: App, sandboxes: tuple[str, ...], once: bool, interval: float) -> None:
    """Show what sandboxes use of the host, again and again; all that have a process, or these.

    CPU is the share of one CPU: 150 % is one and a half. Ends with ^C. With --json, one object a
    line.
    """
    with app.client() as client:
        if once:
            sample = client.sandboxes.list_metrics(sandboxes)
            if app.json:
                print_json(sample)
            else:
                print_table(_HEADER, _rows(sample, None))
            return
        samples = client.sandboxes.watch_metrics(sandboxes, interval=interval)
        if app.json:
            for sample in samples:
                click.echo(json.dumps(jsonable(sample)))
                sys.stdout.flush()
        elif sys.stdout.isatty():
            _show(samples)
        else:
            _print(samples)


def _show(samples: Iterator[Metrics]) -> None:
    from rich.live import Live

    before: Metrics | None = None
    with Live(auto_refresh=False, screen=True) as live:
        for sample in samples:
            live.update(_table(sample, before), refresh=True)
            before = sample


def _print(samples: Iterator[Metrics]) -> None:
    before: Metrics | None = None
    for sample in samples:
        click.echo(moment(sample.time))
        print_table(_HEADER, _rows(sample, before))
        sys.stdout.flush()
        before = sample


def _table(sample: Metrics, before: Metrics | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    using = sum(one.process.cpu_share or 0 for one in sample.sandboxes if one.process)
    title = f"{len(sample.sandboxes)} sandboxes, {100 * using:.0f} % CPU, {moment(sample.time)}"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for name in _HEADER:
        table.add_column(name, no_wrap=True)
    for row in _rows(sample, before):
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _rows(sample: Metrics, before: Metrics | None) -> Iterator[tuple[str, ...]]:
    old = {one.sandbox_id: one for one in before.sandboxes} if before else {}
    seconds = (sample.time - before.time).total_seconds() if before else 0.0
    for one in sample.sandboxes:
        yield _row(one, old.get(one.sandbox_id), seconds)


def _row(one: SandboxMetrics, old: SandboxMetrics | None, seconds: float) -> tuple[str, ...]:
    process = one.process

    def rate(now: int, then: int) -> str:
        # Counters begin anew with a new process.
        return size(round(max(0, now - then) / seconds)) if old and seconds > 0 else "-"

    share = process.cpu_share if process else None
    private = process.private_bytes if process else None
    return (
        one.name,
        one.state,
        "-" if share is None else f"{100 * share:.1f} %",
        f"{one.memory} MiB",
        size(process.rss_bytes) if process else "-",
        "-" if private is None else size(private),
        rate(_read(one), _read(old) if old else 0),
        rate(_written(one), _written(old) if old else 0),
        rate(one.network.received_bytes, old.network.received_bytes if old else 0),
        rate(one.network.sent_bytes, old.network.sent_bytes if old else 0),
        size(one.own_bytes),
        _span(process.uptime) if process else "-",
        one.sandbox_id,
    )


def _read(one: SandboxMetrics) -> int:
    return sum(disk.read_bytes for disk in one.disks)


def _written(one: SandboxMetrics) -> int:
    return sum(disk.written_bytes for disk in one.disks)


def _span(span: timedelta) -> str:
    minutes, seconds = divmod(int(span.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
