"""`stratabox daemon`: another name for strataboxd."""

from __future__ import annotations

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.local import become_local, warn_without_daemon


@click.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]...")
@pass_app
def daemon(app: App, words: tuple[str, ...]) -> None:
    """Run the daemon in the foreground; the same as strataboxd, with all its options."""
    warn_without_daemon()
    become_local(app, words)
