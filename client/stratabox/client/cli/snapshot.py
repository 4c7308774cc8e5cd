"""`stratabox sandbox snapshot`, also as `stratabox snapshot`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import (
    DURATION,
    PAIR,
    TIMESTAMP,
    common,
    env_option,
    idempotency_option,
    level_options,
    metadata_option,
    paging_options,
    ready_options,
    sandbox_argument,
    size_options,
)
from stratabox.client.cli.output import (
    moment,
    print_details,
    print_json,
    print_table,
    printable,
    size,
)
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
    """Capture a sandbox, which keeps running."""
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
@paging_options
@common
@pass_app
def list_(
    app: App,
    /,
    limit: int | None,
    page_token: str | None,
    metadata: tuple[tuple[str, str], ...],
    **filters: Any,
) -> None:
    """List snapshots, newest first."""
    filters["metadata"] = dict(metadata)
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
        ("ID", "NAME", "STATE", "CONSISTENCY", "SANDBOX", "ON DISK", "CREATED", "EXPIRES"),
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
        size(one.layer_bytes),
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
@common
@pass_app
def delete(app: App, snapshot: str) -> None:
    """Remove a snapshot; what was made from it goes on working."""
    with app.client() as client:
        record = client.snapshots.get(snapshot)
        result = client.snapshots.delete(record.id)
    if app.json:
        print_json(
            {
                "id": record.id,
                "name": record.name,
                "deleted": True,
                "freed_bytes": result.freed_bytes,
                "kept_bytes": result.kept_bytes,
                "kept_for": result.kept_for,
            }
        )
        return
    click.echo(
        f"deleted snapshot {printable(record.name)} ({record.id}): "
        f"about {size(result.freed_bytes)} come free"
    )
    if result.kept_bytes:
        click.echo(f"about {size(result.kept_bytes)} stay for: {', '.join(result.kept_for)}")


@snapshot.command()
@_snapshot_argument
@click.option("--name", help="Of the new sandbox; made up where none is given.")
@size_options
@click.option("--disk", "storage", type=int, metavar="GIB", help="Root disk in GiB; may grow.")
@click.option("--cold", is_flag=True, help="Boot its disks, though it has memory.")
@env_option
@metadata_option
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="May be repeated.")
@ready_options
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
