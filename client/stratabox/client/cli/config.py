"""`stratabox config`: the daemon's configuration."""

from __future__ import annotations

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.local import run_local
from stratabox.client.cli.options import common
from stratabox.client.cli.output import print_json, printable
from stratabox.client.errors import DaemonUnavailableError


@click.group()
def config() -> None:
    """The daemon's configuration."""


@config.command()
@common
@pass_app
@click.pass_context
def show(ctx: click.Context, app: App) -> None:
    """Print every key, its value in force, and where that came from.

    Asks the daemon; when none answers, works out what a daemon started here would use.
    """
    try:
        with app.client() as client:
            settings = client.host().settings
    except DaemonUnavailableError as error:
        app.note(
            f"note: no daemon answers at {printable(error.address)}; "
            "one started here would use this"
        )
        ctx.exit(run_local(app, ["config", "show"]))
    if app.json:
        print_json({"settings": settings})
        return
    left = max((len(one.key) for one in settings), default=0)
    middle = max((len(one.value) for one in settings), default=0)
    for one in settings:
        line = f"{one.key:<{left}} = {one.value:<{middle}}  # {one.source}"
        click.echo(printable(line))
