"""`stratabox volume`: disks that outlive sandboxes."""

from __future__ import annotations

from typing import Any

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import (
    PAIR,
    SIZE,
    common,
    idempotency_option,
    metadata_option,
    paging_options,
)
from stratabox.client.cli.output import (
    moment,
    print_details,
    print_json,
    print_table,
    printable,
    size,
)
from stratabox.client.records import SnapshotLevel
from stratabox.client.volume_records import Volume

_volume_argument = click.argument("volume")
_snapshot_argument = click.argument("volume_snapshot", metavar="SNAPSHOT")
_sandbox_option = click.option(
    "--session", "sandbox", required=True, metavar="SANDBOX", help="The sandbox."
)


@click.group()
def volume() -> None:
    """Make, keep, grow and attach volumes: disks that outlive sandboxes."""


@volume.group()
def snapshot() -> None:
    """Take and keep snapshots of volumes."""


def _show(app: App, record: object) -> None:
    (print_json if app.json else print_details)(record)


@volume.command()
@click.argument("name", required=False)
@click.option("--size", "size_bytes", type=SIZE, metavar="SIZE", help="As 512MiB or 10GiB.")
@click.option("--from-volume", metavar="VOLUME", help="A copy of it as it is now.")
@click.option("--from-snapshot", metavar="SNAPSHOT", help="A copy of a snapshot of a volume.")
@metadata_option
@idempotency_option
@common
@pass_app
def create(
    app: App,
    /,
    name: str | None,
    size_bytes: int | None,
    metadata: tuple[tuple[str, str], ...],
    **options: Any,
) -> None:
    """Make a volume, formatted, or a copy of another one."""
    if size_bytes is None and not (options["from_volume"] or options["from_snapshot"]):
        raise click.UsageError("Missing --size, or what it is a copy of.")
    with app.client() as client, app.waiting("making the volume"):
        record = client.volumes.create(
            name, size_bytes=size_bytes or 0, metadata=dict(metadata), **options
        )
    _show(app, record)


@volume.command("list")
@click.option("--name", help="Only with exactly this name.")
@click.option("--metadata", type=PAIR, multiple=True, metavar="K=V", help="Only with all of these.")
@paging_options
@common
@pass_app
def list_(
    app: App,
    /,
    name: str | None,
    metadata: tuple[tuple[str, str], ...],
    limit: int | None,
    page_token: str | None,
) -> None:
    """List volumes, newest first. OWN is what comes free when that one alone is deleted."""
    token: str | None = None
    filters: dict[str, Any] = {"name": name, "metadata": dict(metadata)}
    with app.client() as client:
        if limit is None and page_token is None:
            found = client.volumes.list(**filters)
        else:
            page = client.volumes.list_page(page_size=limit, page_token=page_token, **filters)
            found, token = list(page.items), page.next_page_token
    if app.json:
        print_json({"volumes": found, "next_page_token": token})
        return
    print_table(
        ("ID", "NAME", "STATE", "SIZE", "OWN", "SHARED", "HELD BY", "CREATED"),
        (
            (
                one.id,
                one.name,
                one.state,
                size(one.size_bytes),
                size(one.space.own_bytes),
                size(one.space.shared_bytes),
                _held_by(one),
                moment(one.created_at),
            )
            for one in found
        ),
    )
    if token:
        app.note(f"more: --page-token {token}")


def _held_by(one: Volume) -> str:
    return (
        ", ".join(
            f"{each.sandbox_id}:{each.path}{':ro' if each.read_only else ''}"
            for each in one.attachments
        )
        or "-"
    )


@volume.command()
@_volume_argument
@common
@pass_app
def get(app: App, volume: str) -> None:
    """Print one volume."""
    with app.client() as client:
        _show(app, client.volumes.get(volume))


@volume.command()
@_volume_argument
@click.option("--name", help="The new name.")
@click.option("--metadata", type=PAIR, multiple=True, metavar="K=V", help="All new metadata.")
@click.option("--clear", type=click.Choice(["metadata"]), multiple=True, help="Leave it empty.")
@common
@pass_app
def update(
    app: App,
    volume: str,
    name: str | None,
    metadata: tuple[tuple[str, str], ...],
    clear: tuple[str, ...],
) -> None:
    """Replace name or metadata; each is replaced whole."""
    with app.client() as client:
        record = client.volumes.update(
            volume, name=name, metadata=dict(metadata) if metadata or clear else None
        )
    _show(app, record)


@volume.command()
@_volume_argument
@click.option("--size", "size_bytes", type=SIZE, required=True, metavar="SIZE", help="As 20GiB.")
@common
@pass_app
def resize(app: App, volume: str, size_bytes: int) -> None:
    """Grow a volume, also while a guest writes it."""
    with app.client() as client, app.waiting("growing the volume"):
        _show(app, client.volumes.resize(volume, size_bytes))


@volume.command()
@_volume_argument
@common
@pass_app
def delete(app: App, volume: str) -> None:
    """Remove a volume; refused while a sandbox has it."""
    with app.client() as client:
        record = client.volumes.get(volume)
        result = client.volumes.delete(record.id)
    _deleted(app, "volume", record.id, record.name, result.freed_bytes)


@volume.command()
@_volume_argument
@_sandbox_option
@click.option("--path", required=True, metavar="/PATH", help="Where the guest has it.")
@click.option("--read-only", is_flag=True, help="The guest may only read it.")
@common
@pass_app
def attach(app: App, volume: str, sandbox: str, path: str, read_only: bool) -> None:
    """Give a sandbox a volume."""
    with app.client() as client, app.waiting("attaching the volume"):
        record = client.sandboxes.attach_volume(sandbox, volume, path, read_only=read_only)
    _show(app, record)


@volume.command()
@_volume_argument
@_sandbox_option
@click.option(
    "--force", is_flag=True, help="Do not ask the guest: what it has not written is lost."
)
@common
@pass_app
def detach(app: App, volume: str, sandbox: str, force: bool) -> None:
    """Take a volume from a sandbox, once its guest has let go of it."""
    with app.client() as client, app.waiting("detaching the volume"):
        record = client.sandboxes.detach_volume(sandbox, volume, force=force)
    _show(app, record)


@snapshot.command("create")
@_volume_argument
@click.option("--name", help="Free text; made up where none is given.")
@click.option(
    "--level",
    type=click.Choice([str(SnapshotLevel.CRASH), str(SnapshotLevel.APPLICATION)]),
    help="That one or nothing; otherwise application where it can be had.",
)
@idempotency_option
@common
@pass_app
def create_snapshot(app: App, /, volume: str, **options: Any) -> None:
    """Capture a volume, also while a guest writes it."""
    with app.client() as client, app.waiting("capturing the volume"):
        _show(app, client.volumes.snapshot(volume, **options))


@snapshot.command("list")
@click.option(
    "--volume", metavar="VOLUME", help="Only of this one; by id also of one that is gone."
)
@paging_options
@common
@pass_app
def list_snapshots(app: App, volume: str | None, limit: int | None, page_token: str | None) -> None:
    """List snapshots of volumes, newest first."""
    token: str | None = None
    with app.client() as client:
        if limit is None and page_token is None:
            found = client.volumes.list_snapshots(volume=volume)
        else:
            page = client.volumes.list_snapshots_page(
                page_size=limit, page_token=page_token, volume=volume
            )
            found, token = list(page.items), page.next_page_token
    if app.json:
        print_json({"volume_snapshots": found, "next_page_token": token})
        return
    print_table(
        ("ID", "NAME", "VOLUME", "CONSISTENCY", "SIZE", "OWN", "SHARED", "CREATED"),
        (
            (
                one.id,
                one.name,
                one.volume_name,
                one.consistency,
                size(one.size_bytes),
                size(one.space.own_bytes),
                size(one.space.shared_bytes),
                moment(one.created_at),
            )
            for one in found
        ),
    )
    if token:
        app.note(f"more: --page-token {token}")


@snapshot.command("get")
@_snapshot_argument
@common
@pass_app
def get_snapshot(app: App, volume_snapshot: str) -> None:
    """Print one snapshot of a volume."""
    with app.client() as client:
        _show(app, client.volumes.get_snapshot(volume_snapshot))


@snapshot.command("delete")
@_snapshot_argument
@common
@pass_app
def delete_snapshot(app: App, volume_snapshot: str) -> None:
    """Remove a snapshot of a volume; what was made from it goes on working."""
    with app.client() as client:
        record = client.volumes.get_snapshot(volume_snapshot)
        result = client.volumes.delete_snapshot(record.id)
    _deleted(app, "volume snapshot", record.id, record.name, result.freed_bytes)


def _deleted(app: App, noun: str, id: str, name: str, freed: int) -> None:
    if app.json:
        print_json({"id": id, "name": name, "deleted": True, "freed_bytes": freed})
    else:
        click.echo(f"deleted {noun} {printable(name)} ({id}): {size(freed)} came free")
