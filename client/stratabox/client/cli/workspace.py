"""`stratabox workspace`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import SIZE, common
from stratabox.client.cli.output import moment, print_details, print_json, print_table, size
from stratabox.client.workspace_records import Quota, Workspace

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def workspace() -> None:
    """Tenants: each sees only its own things, and may have so much of them.

    For admins: by the Unix socket, or with the key of one. Which workspace a command works in, they
    say by --workspace or STRATABOX_WORKSPACE; everybody else's key is of one.
    """


def _quota_options(command: F) -> F:
    """Add what a quota is of; without one of them, that is not limited."""
    for option in (
        click.option("--snapshots", type=int, metavar="N", help="Of sandboxes and of volumes."),
        click.option(
            "--disk", type=SIZE, metavar="SIZE",
            help="As 100GiB: what disks and volumes may grow to, and what snapshots keep.",
        ),
        click.option("--memory", type=int, metavar="MIB", help="RAM of its sandboxes together."),
        click.option("--cpus", type=int, metavar="N", help="Virtual CPUs of them together."),
        click.option("--sandboxes", type=int, metavar="N", help="That are not terminated."),
    ):  # fmt: skip
        command = option(command)
    return command


@workspace.command()
@click.argument("name")
@_quota_options
@common
@pass_app
def create(
    app: App,
    name: str,
    sandboxes: int | None,
    cpus: int | None,
    memory: int | None,
    disk: int | None,
    snapshots: int | None,
) -> None:
    """Make a workspace. Its keys are made by `key create --workspace NAME`."""
    quota = Quota(
        sandboxes=sandboxes, cpus=cpus, memory=memory, disk_bytes=disk, snapshots=snapshots
    )
    with app.client() as client:
        _show(app, client.workspaces.create(name, quota))


@workspace.command("list")
@common
@pass_app
def list_(app: App) -> None:
    """List workspaces: what they have, of what they may have."""
    with app.client() as client:
        found = client.workspaces.list()
    if app.json:
        print_json({"workspaces": found})
        return
    print_table(
        ("NAME", "SANDBOXES", "CPUS", "MEMORY", "DISK", "SNAPSHOTS", "CREATED"),
        (_row(one) for one in found),
    )


@workspace.command()
@click.argument("name", required=False)
@common
@pass_app
def get(app: App, name: str | None) -> None:
    """Print a workspace; without a name, the one that commands work in."""
    with app.client() as client:
        _show(app, client.workspaces.get(name or ""))


@workspace.command("set-quota")
@click.argument("name")
@_quota_options
@common
@pass_app
def set_quota(
    app: App,
    name: str,
    sandboxes: int | None,
    cpus: int | None,
    memory: int | None,
    disk: int | None,
    snapshots: int | None,
) -> None:
    """Replace a workspace's quota: what is not named is not limited any more.

    What it has stays, also where that is more.
    """
    quota = Quota(
        sandboxes=sandboxes, cpus=cpus, memory=memory, disk_bytes=disk, snapshots=snapshots
    )
    with app.client() as client:
        _show(app, client.workspaces.set_quota(name, quota))


@workspace.command()
@click.argument("name")
@common
@pass_app
def delete(app: App, name: str) -> None:
    """Remove a workspace that has nothing any more, and revoke its keys."""
    with app.client() as client:
        done = client.workspaces.delete(name)
    if app.json:
        print_json(done)
        return
    keys = f", and its {len(done.revoked_keys)} keys revoked" if done.revoked_keys else ""
    click.echo(f"deleted workspace {done.name}{keys}")


def _row(one: Workspace) -> tuple[str, ...]:
    usage, quota = one.usage, one.quota
    return (
        one.name,
        _of(usage.sandboxes, quota.sandboxes),
        _of(usage.cpus, quota.cpus),
        _of(usage.memory, quota.memory),
        _of(usage.disk_bytes, quota.disk_bytes, size),
        _of(usage.snapshots, quota.snapshots),
        moment(one.created_at),
    )


def _of(used: int, limit: int | None, show: Callable[[int], str] = str) -> str:
    return show(used) if limit is None else f"{show(used)} of {show(limit)}"


def _show(app: App, record: Workspace) -> None:
    (print_json if app.json else print_details)(record)
