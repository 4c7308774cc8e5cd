"""`stratabox key`: API keys, for calls on TCP addresses. Works on the state folder, not the API."""

from __future__ import annotations

import os

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.local import run_local, warn_without_daemon
from stratabox.client.cli.options import common

_state_dir = click.option(
    "--state-dir", metavar="FOLDER", help="The daemon's; without: as its configuration says."
)


@click.group()
def key() -> None:
    """API keys, which every call on a TCP address takes.

    On the daemon's host, for whoever may write its state folder, whether it runs or not.
    """


@key.command()
@click.option("--name", metavar="NAME", help="What it is for; without: its id.")
@click.option(
    "--role",
    type=click.Choice(["read-only", "user", "admin"]),
    default="user",
    show_default=True,
    help="What it may do.",
)
@click.option(
    "--expires", metavar="WHEN", help="A span of time, as 90d, or an RFC 3339 time; without: never."
)
@_state_dir
@common
@pass_app
@click.pass_context
def create(
    ctx: click.Context,
    app: App,
    name: str | None,
    role: str,
    expires: str | None,
    state_dir: str | None,
) -> None:
    """Make a key, and show it: this once, for it is kept nowhere.

    It opens what is the workspace's that --workspace names; without: default.
    """
    workspace = app.workspace or os.environ.get("STRATABOX_WORKSPACE")
    words = ["key", "create", f"--role={role}"]
    for option, value in (("name", name), ("workspace", workspace), ("expires", expires)):
        words += [] if value is None else [f"--{option}={value}"]
    _run(ctx, app, words, state_dir)


@key.command("list")
@click.option("--all", "revoked", is_flag=True, help="Those that are revoked, too.")
@_state_dir
@common
@pass_app
@click.pass_context
def list_(ctx: click.Context, app: App, revoked: bool, state_dir: str | None) -> None:
    """List keys, without their secrets, oldest first."""
    _run(ctx, app, ["key", "list", *(["--all"] if revoked else [])], state_dir)


@key.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@_state_dir
@common
@pass_app
@click.pass_context
def revoke(ctx: click.Context, app: App, keys: tuple[str, ...], state_dir: str | None) -> None:
    """Make keys open nothing any more, by their ids or names; their calls under way end."""
    _run(ctx, app, ["key", "revoke", *keys], state_dir)


def _run(ctx: click.Context, app: App, words: list[str], state_dir: str | None) -> None:
    warn_without_daemon()
    where = [] if state_dir is None else [f"--state-dir={state_dir}"]
    ctx.exit(run_local(app, [*words, *where]))
