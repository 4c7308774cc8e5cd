"""`stratabox host`: what the daemon's host has for guests."""

from __future__ import annotations

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common
from stratabox.client.cli.output import print_json, print_table, printable, size
from stratabox.client.host_records import Host, HostAccount


@click.command()
@common
@pass_app
def host(app: App) -> None:
    """Say what the daemon runs on, what guests have of its host, and what is left.

    GROWTH is what guests could still take, were every page of their RAM to become their own and
    every disk be written full: memory that copies share with each other is there once, but each of
    them may write it. New guests are refused beyond a LIMIT (admission.* in the configuration).
    """
    with app.client() as client:
        found = client.host()
    if app.json:
        print_json({"host": found})
        return
    for line in _lines(found):
        click.echo(printable(line))
    click.echo()
    print_table(
        ("WHAT", "GRANTED", "LIMIT", "USED", "GROWTH", "LIMIT", "FREE"), _rows(found.account)
    )


def _lines(found: Host) -> list[str]:
    return [
        f"Stratabox {found.version}, QEMU {found.qemu_version}, {found.accelerator}"
        f" ({found.accelerator_reason})",
        f"{found.state_dir}, daemon {found.pid}, launcher {found.launcher}",
        f"limits of guests: {_limits(found)}",
    ]


def _limits(found: Host) -> str:
    held = f"{', '.join(found.limits)} by {found.limits_by}" if found.limits else "none"
    return f"{held} ({found.limits_reason})" if found.limits_reason else held


def _rows(account: HostAccount) -> list[tuple[str, ...]]:
    return [
        (
            "memory",
            _mib(account.memory_granted),
            _limit(account.memory_limit),
            _mib(account.memory_own),
            _mib(account.memory_growth),
            _limit(account.memory_growth_limit),
            _mib(account.memory_available),
        ),
        (
            "disk",
            "",
            "",
            "",
            _mib(account.disk_growth),
            _limit(account.disk_growth_limit),
            _mib(account.disk_free),
        ),
        (
            "CPUs",
            str(account.cpus_granted),
            str(account.cpus_limit or "none"),
            "",
            "",
            "",
            str(account.cpus_total),
        ),
        (
            "sandboxes",
            str(account.sandboxes),
            str(account.sandboxes_limit or "none"),
            "",
            "",
            "",
            "",
        ),
    ]


def _mib(count: int) -> str:
    return size(count << 20)


def _limit(count: int) -> str:
    return _mib(count) if count else "none"
