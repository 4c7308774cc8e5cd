"""`stratabox sandbox snapshot`, also as `stratabox snapshot`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from stratabox.client.cli import transfer
from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.networks import network_options
from stratabox.client.cli.options import (
    DURATION,
    PAIR,
    TIMESTAMP,
    common,
    default_level,
    env_option,
    expiry_options,
    idempotency_option,
    identity_option,
    level_options,
    metadata_option,
    paging_options,
    paused_option,
    ready_options,
    sandbox_argument,
    size_options,
    volume_option,
)
from stratabox.client.cli.output import (
    moment,
    print_details,
    print_json,
    print_table,
    printable,
    size,
)
from stratabox.client.cli.probes import probe_options
from stratabox.client.cli.tree import show_tree
from stratabox.client.errors import DeadlineExceededError
from stratabox.client.records import Snapshot, SnapshotState

_STATES = click.Choice(
    [str(one) for one in SnapshotState if one not in (SnapshotState.UNKNOWN, SnapshotState.DELETED)]
)
_snapshot_argument = click.argument("snapshot")


@click.group()
def snapshot() -> None:
    """Take, keep and restore snapshots."""


def _show(app: App, record: object) -> None:
    (print_json if app.json else print_details)(record)


@snapshot.command()
@sandbox_argument
@click.option("--name", help="Free text; made up where none is given.")
@default_level
@level_options
@click.option("--memory", is_flag=True, help="The same as --level memory.")
@click.option("--expires-at", type=TIMESTAMP, metavar="RFC3339", help="As 2026-03-20T12:00:00Z.")
@metadata_option
@click.option("--wait/--no-wait", default=True, help="Whether to wait until it is ready.")
@click.option(
    "--wait-timeout",
    type=DURATION,
    metavar="DURATION",
    help="As 10m; ends the waiting, not the snapshot.",
)
@idempotency_option
@common
@pass_app
def create(
    app: App,
    /,
    sandbox: str,
    metadata: tuple[tuple[str, str], ...],
    memory: bool,
    wait: bool,
    wait_timeout: float | None,
    **options: Any,
) -> None:
    """Capture a sandbox, which keeps running.

    Where no level is named, STRATABOX_DEFAULT_LEVEL names it.
    """
    if memory:
        if options["quick"] or options["level"] not in (None, "memory"):
            raise click.UsageError("--memory, --quick and --level name different levels")
        options["level"] = "memory"
    with app.client() as client, app.waiting("taking the snapshot"):
        record = client.snapshots.create(sandbox, metadata=dict(metadata), wait=False, **options)
        if wait:
            try:
                record = client.snapshots.wait_ready(record.id, timeout=wait_timeout)
            except DeadlineExceededError as error:
                raise DeadlineExceededError(
                    f"the snapshot {record.id} is not ready yet; it goes on",
                    metadata={"snapshot_id": record.id},
                ) from error
            except KeyboardInterrupt:
                app.note(f"the snapshot {record.id} goes on")
                raise
    _show(app, record)


@snapshot.command("list")
@click.option("--session", "sandbox", metavar="SANDBOX", help="Only of this one.")
@click.option("--state", "states", type=_STATES, multiple=True, help="May be repeated.")
@click.option("--name", help="Only with exactly this name.")
@click.option("--metadata", type=PAIR, multiple=True, metavar="K=V", help="Only with all of these.")
@click.option("--tree", is_flag=True, help="Draw what was made from what, with sandboxes.")
@paging_options
@common
@pass_app
def list_(
    app: App,
    /,
    limit: int | None,
    page_token: str | None,
    metadata: tuple[tuple[str, str], ...],
    tree: bool,
    **filters: Any,
) -> None:
    """List snapshots, newest first.

    OWN is what comes free when that one alone is deleted.
    """
    filters["metadata"] = dict(metadata)
    if tree:
        if limit is not None or page_token is not None:
            raise click.UsageError("--tree draws all of it: not with --limit or --page-token.")
        show_tree(app, filters)
        return
    token: str | None = None
    with app.client() as client:
        if limit is None and page_token is None:
            found = client.snapshots.list(**filters)
        else:
            page = client.snapshots.list_page(page_size=limit, page_token=page_token, **filters)
            found, token = list(page.items), page.next_page_token
    if app.json:
        print_json({"snapshots": found, "next_page_token": token})
        return
    print_table(
        ("ID", "NAME", "STATE", "CONSISTENCY", "SANDBOX", "OWN", "SHARED", "CREATED", "EXPIRES"),
        (_row(one) for one in found),
    )
    if token:
        app.note(f"more: --page-token {token}")


def _row(one: Snapshot) -> tuple[str, ...]:
    return (
        one.id,
        one.name,
        one.state,
        one.consistency or "-",
        one.source_sandbox_name or one.source_sandbox_id or "-",
        size(one.space.own_bytes),
        size(one.space.shared_bytes),
        moment(one.created_at),
        moment(one.expires_at),
    )


@snapshot.command()
@_snapshot_argument
@common
@pass_app
def get(app: App, snapshot: str) -> None:
    """Print one snapshot."""
    with app.client() as client:
        _show(app, client.snapshots.get(snapshot))


@snapshot.command()
@_snapshot_argument
@click.option("--name", help="The new name.")
@click.option("--expires-at", type=TIMESTAMP, metavar="RFC3339", help="As 2026-03-20T12:00:00Z.")
@click.option("--no-expiry", is_flag=True, help="Keep it until it is deleted.")
@click.option("--metadata", type=PAIR, multiple=True, metavar="K=V", help="All new metadata.")
@click.option("--clear", type=click.Choice(["metadata"]), multiple=True)
@common
@pass_app
def update(
    app: App,
    /,
    snapshot: str,
    name: str | None,
    expires_at: datetime | None,
    no_expiry: bool,
    metadata: tuple[tuple[str, str], ...],
    clear: tuple[str, ...],
) -> None:
    """Replace name, expiry or metadata; each is replaced whole."""
    if expires_at and no_expiry:
        raise click.UsageError("--expires-at and --no-expiry exclude each other.")
    expiry: dict[str, Any] = {"expires_at": expires_at} if expires_at or no_expiry else {}
    with app.client() as client:
        record = client.snapshots.update(
            snapshot,
            name=name,
            metadata=dict(metadata) if metadata or clear else None,
            **expiry,
        )
    _show(app, record)


@snapshot.command()
@_snapshot_argument
@click.option("--wait/--no-wait", default=True, help="Whether to wait until it is done.")
@common
@pass_app
def compact(app: App, snapshot: str, wait: bool) -> None:
    """Compress what a snapshot has on the disk."""
    with app.client() as client, app.waiting("compressing the snapshot"):
        result = client.snapshots.compact(snapshot, wait=wait)
    if app.json:
        print_json(result)
        return
    name = printable(result.snapshot.name)
    if not result.jobs:
        click.echo(f"snapshot {name} is compressed already")
    elif wait:
        click.echo(f"compressed snapshot {name}: it takes {size(result.snapshot.layer_bytes)}")
    else:
        click.echo(f"snapshot {name} is being compressed: {', '.join(j.id for j in result.jobs)}")


@snapshot.command()
@_snapshot_argument
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would come free.")
@common
@pass_app
def delete(app: App, snapshot: str, dry_run: bool) -> None:
    """Remove a snapshot; what was made from it goes on working."""
    with app.client() as client:
        record = client.snapshots.get(snapshot)
        result = client.snapshots.delete(record.id, dry_run=dry_run)
    if app.json:
        print_json(
            {
                "id": record.id,
                "name": record.name,
                "deleted": not dry_run,
                "freed_bytes": result.freed_bytes,
                "kept_bytes": result.kept_bytes,
                "kept_for": result.kept_for,
            }
        )
        return
    what = f"snapshot {printable(record.name)} ({record.id})"
    if dry_run:
        click.echo(f"deleting {what} would free {size(result.freed_bytes)}")
    else:
        click.echo(f"deleted {what}: {size(result.freed_bytes)} come free")
    if result.kept_bytes:
        click.echo(f"{size(result.kept_bytes)} stay for: {', '.join(result.kept_for)}")


@snapshot.command()
@_snapshot_argument
@click.option("--name", help="Of the new sandbox; made up where none is given.")
@size_options
@click.option("--disk", "storage", type=int, metavar="GIB", help="Root disk in GiB; may grow.")
@click.option("--cold", is_flag=True, help="Boot its disks, though it has memory.")
@click.option("--verify", is_flag=True, help="Compare its saved memory with its checksums first.")
@network_options
@identity_option
@paused_option
@expiry_options
@env_option
@metadata_option
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="May be repeated.")
@volume_option
@ready_options
@probe_options
@idempotency_option
@common
@pass_app
def restore(
    app: App,
    /,
    snapshot: str,
    env: tuple[tuple[str, str], ...],
    metadata: tuple[tuple[str, str], ...],
    **options: Any,
) -> None:
    """Make a new sandbox of a snapshot."""
    with app.client() as client, app.waiting("restoring the snapshot"):
        record = client.snapshots.restore(
            snapshot, env=dict(env), metadata=dict(metadata), **options
        )
    _show(app, record)


snapshot.add_command(transfer.export_snapshot)
snapshot.add_command(transfer.import_snapshot)
