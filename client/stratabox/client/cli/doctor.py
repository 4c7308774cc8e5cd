"""`stratabox doctor`: what this host can do."""

from __future__ import annotations

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.local import run_local, warn_without_daemon
from stratabox.client.cli.options import common


@click.command(context_settings={"ignore_unknown_options": True})
@common
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[DAEMON OPTIONS]...")
@pass_app
@click.pass_context
def doctor(ctx: click.Context, app: App, words: tuple[str, ...]) -> None:
    """Say what this host can do as a host of sandboxes, and how to mend what is missing.

    Examines the host that it runs on. Exits with 1 when something must be mended.
    """
    warn_without_daemon()
    ctx.exit(run_local(app, ["doctor", *words]))
