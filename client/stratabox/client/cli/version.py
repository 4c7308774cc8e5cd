"""`stratabox version`: what is installed."""

from __future__ import annotations

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common
from stratabox.client.cli.output import print_json


@click.command()
@common
@pass_app
def version(app: App) -> None:
    """Print the version of this client."""
    from importlib import metadata

    installed = metadata.version("stratabox")
    if app.json:
        print_json({"version": installed})
    else:
        click.echo(f"stratabox {installed}")
