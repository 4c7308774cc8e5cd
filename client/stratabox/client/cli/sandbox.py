"""`stratabox sandbox`: the life of sandboxes."""

from __future__ import annotations

from datetime import datetime
from typing import Any, BinaryIO, TextIO

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.console import console
from stratabox.client.cli.copy import copy
from stratabox.client.cli.exec import execute
from stratabox.client.cli.files import files
from stratabox.client.cli.metrics import metrics, top
from stratabox.client.cli.networks import network_options
from stratabox.client.cli.options import (
    DURATION,
    PAIR,
    common,
    env_option,
    expiry_options,
    idempotency_option,
    identity_option,
    keeping_options,
    keys_in,
    level_options,
    metadata_option,
    paging_options,
    paused_option,
    ready_options,
    sandbox_argument,
    size_options,
    volume_option,
)
from stratabox.client.cli.output import moment, print_details, print_json, print_table, printable
from stratabox.client.cli.port import port
from stratabox.client.cli.probes import probe_options
from stratabox.client.cli.process import process
from stratabox.client.cli.snapshot import snapshot
from stratabox.client.cli.ssh import ssh, ssh_key, ssh_proxy
from stratabox.client.probe_records import ReadinessProbe
from stratabox.client.records import SandboxRecord, SandboxState, SnapshotSchedule

_STATES = click.Choice([str(one) for one in SandboxState if one is not SandboxState.UNKNOWN])


@click.group()
def sandbox() -> None:
    """Create, use, copy and end sandboxes."""


sandbox.add_command(snapshot)
sandbox.add_command(port)
sandbox.add_command(ssh)
sandbox.add_command(ssh_key)
sandbox.add_command(ssh_proxy)
sandbox.add_command(execute)
sandbox.add_command(process)
sandbox.add_command(copy)
sandbox.add_command(files)
sandbox.add_command(console)
sandbox.add_command(metrics)
sandbox.add_command(top)


def show(app: App, record: SandboxRecord) -> None:
    """Print one sandbox."""
    (print_json if app.json else print_details)(record)


@sandbox.command()
@click.option("--name", help="Free text; made up where none is given.")
@click.option("--image", metavar="IMAGE", help="Where its disk comes from; the daemon's default.")
@click.option("--snapshot", metavar="SNAPSHOT", help="Where its disk comes from, instead.")
@click.option("--verify", is_flag=True, help="Compare the snapshot's saved memory first.")
@size_options
@click.option("--disk", "storage", type=int, metavar="GIB", help="Root disk, in GiB.")
@env_option
@metadata_option
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="May be repeated.")
@click.option(
    "--data-disk",
    "data_disks",
    type=int,
    multiple=True,
    metavar="GIB",
    help="An empty disk beside the root disk; may be repeated.",
)
@volume_option
@click.option(
    "--user-data",
    type=click.File("rb"),
    metavar="FILE",
    help="For cloud-init at its first boot; - is stdin.",
)
@click.option(
    "--ssh-key",
    "ssh_key_files",
    type=click.File("r", encoding="utf-8"),
    multiple=True,
    metavar="FILE",
    help="Public keys that may log in as the cloud image's user (a .pub file); may be repeated.",
)
@network_options
@identity_option
@paused_option
@expiry_options
@keeping_options
@ready_options
@probe_options
@idempotency_option
@common
@pass_app
def create(
    app: App,
    /,
    env: tuple[tuple[str, str], ...],
    metadata: tuple[tuple[str, str], ...],
    keep_last: int | None,
    user_data: BinaryIO | None,
    ssh_key_files: tuple[TextIO, ...],
    **options: Any,
) -> None:
    """Create a sandbox from an image or a snapshot, and start it."""
    options["keep_last"] = keep_last or 0
    options["user_data"] = user_data.read() if user_data else b""
    options["ssh_keys"] = [key for file in ssh_key_files for key in keys_in(file.read())]
    with app.client() as client, app.waiting("creating the sandbox"):
        record = client.sandboxes.create(env=dict(env), metadata=dict(metadata), **options)
    show(app, record)


@sandbox.command("list")
@click.option("--state", "states", type=_STATES, multiple=True, help="May be repeated.")
@click.option("--name", help="Only with exactly this name.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Only with all of these.")
@click.option("--metadata", type=PAIR, multiple=True, metavar="K=V", help="Only with all of these.")
@click.option("--image", metavar="IMAGE", help="Only those descending from it.")
@click.option("--all", "include_terminated", is_flag=True, help="Terminated ones too.")
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
    """List sandboxes, newest first."""
    filters["metadata"] = dict(metadata)
    token: str | None = None
    with app.client() as client:
        if limit is None and page_token is None:
            found = client.sandboxes.list(**filters)
        else:
            page = client.sandboxes.list_page(page_size=limit, page_token=page_token, **filters)
            found, token = list(page.items), page.next_page_token
    if app.json:
        print_json({"sandboxes": found, "next_page_token": token})
        return
    print_table(
        ("ID", "NAME", "STATE", "CPUS", "MEMORY", "DISK", "IMAGE", "CREATED"),
        (
            (
                one.id,
                one.name,
                one.state if one.ready or one.state != "running" else "running (not ready)",
                str(one.cpus),
                f"{one.memory} MiB",
                f"{one.storage} GiB",
                one.image_name or one.image_id or "-",
                moment(one.created_at),
            )
            for one in found
        ),
    )
    if token:
        app.note(f"more: --page-token {token}")


@sandbox.command()
@sandbox_argument
@common
@pass_app
def get(app: App, sandbox: str) -> None:
    """Print one sandbox."""
    with app.client() as client:
        show(app, client.sandboxes.get(sandbox))


@sandbox.command()
@sandbox_argument
@click.option("--name", help="The new name.")
@click.option("--env", type=PAIR, multiple=True, metavar="K=V", help="The whole new environment.")
@click.option("--metadata", type=PAIR, multiple=True, metavar="K=V", help="All new metadata.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="All new tags.")
@expiry_options
@click.option("--no-expiry", is_flag=True, help="Its time is never up.")
@network_options
@keeping_options
@click.option("--no-snapshot-schedule", is_flag=True, help="Take no more snapshots by the clock.")
@click.option(
    "--clear",
    type=click.Choice(["env", "metadata", "tags", "expires_at"]),
    multiple=True,
    help="Leave it empty; expires_at: its time is never up.",
)
@probe_options
@common
@pass_app
def update(
    app: App,
    /,
    sandbox: str,
    name: str | None,
    env: tuple[tuple[str, str], ...],
    metadata: tuple[tuple[str, str], ...],
    tags: tuple[str, ...],
    expires_at: datetime | None,
    no_expiry: bool,
    on_timeout: str | None,
    keep_last: int | None,
    snapshot_schedule: SnapshotSchedule | None,
    no_snapshot_schedule: bool,
    clear: tuple[str, ...],
    network: list[str] | str | None,
    readiness_probe: ReadinessProbe | None,
) -> None:
    """Replace name, env, metadata, tags, limits of time, keeping or network; each whole."""
    if expires_at and no_expiry:
        raise click.UsageError("--expires-at and --no-expiry exclude each other.")
    if snapshot_schedule and no_snapshot_schedule:
        raise click.UsageError("--snapshot-every and --no-snapshot-schedule exclude each other.")
    times: dict[str, Any] = {}
    if expires_at is not None or no_expiry or "expires_at" in clear:
        times["expires_at"] = expires_at
    if snapshot_schedule or no_snapshot_schedule:
        times["snapshot_schedule"] = snapshot_schedule
    if readiness_probe is not None:
        times["readiness_probe"] = readiness_probe
    with app.client() as client:
        record = client.sandboxes.update(
            sandbox,
            name=name,
            env=dict(env) if env or "env" in clear else None,
            metadata=dict(metadata) if metadata or "metadata" in clear else None,
            tags=tags if tags or "tags" in clear else None,
            on_timeout=on_timeout,
            keep_last=keep_last,
            network=network,
            **times,
        )
    show(app, record)


@sandbox.command()
@sandbox_argument
@click.option("--to-disk", is_flag=True, help="Save the RAM to disk, and end the process.")
@common
@pass_app
def pause(app: App, sandbox: str, to_disk: bool) -> None:
    """Stop the vCPUs and keep the RAM."""
    with app.client() as client, app.waiting("pausing the guest"):
        show(app, client.sandboxes.pause(sandbox, to_disk=to_disk))


@sandbox.command()
@sandbox_argument
@identity_option
@ready_options
@common
@pass_app
def resume(app: App, /, sandbox: str, **options: Any) -> None:
    """Continue a paused sandbox."""
    with app.client() as client, app.waiting("resuming the guest"):
        record = client.sandboxes.resume(sandbox, **options)
    show(app, record)


@sandbox.command()
@sandbox_argument
@click.option("--force", is_flag=True, help="Cut the power without asking the guest.")
@click.option("--timeout", type=DURATION, metavar="DURATION", help="How long the guest may take.")
@common
@pass_app
def stop(app: App, sandbox: str, force: bool, timeout: float | None) -> None:
    """Shut the guest down; the disks stay."""
    with app.client() as client, app.waiting("stopping the guest"):
        record = client.sandboxes.stop(sandbox, force=force, timeout=timeout)
    show(app, record)


@sandbox.command()
@sandbox_argument
@ready_options
@probe_options
@common
@pass_app
def start(app: App, /, sandbox: str, **options: Any) -> None:
    """Boot a stopped or failed sandbox from its disks."""
    with app.client() as client, app.waiting("starting the guest"):
        record = client.sandboxes.start(sandbox, **options)
    show(app, record)


@sandbox.command()
@sandbox_argument
@common
@pass_app
def terminate(app: App, sandbox: str) -> None:
    """End the guest and free its disks; the record stays."""
    with app.client() as client:
        show(app, client.sandboxes.terminate(sandbox))


@sandbox.command()
@sandbox_argument
@common
@pass_app
def delete(app: App, sandbox: str) -> None:
    """End the guest where needed, and remove the record too."""
    with app.client() as client:
        record = client.sandboxes.get(sandbox)
        client.sandboxes.delete(record.id)
    if app.json:
        print_json({"id": record.id, "name": record.name, "deleted": True})
    else:
        click.echo(f"deleted sandbox {printable(record.name)} ({record.id})")


@sandbox.command()
@sandbox_argument
@click.option("--name", help='Of the copy; several get "-1", "-2", ... behind it.')
@click.option("--count", type=int, default=1, help="How many copies, 1-64.")
@click.option("--snapshot-name", metavar="NAME", help="Of the snapshot that it is made from.")
@size_options
@env_option
@volume_option
@level_options
@network_options
@identity_option
@paused_option
@ready_options
@probe_options
@idempotency_option
@common
@pass_app
@click.pass_context
def clone(
    ctx: click.Context,
    app: App,
    /,
    sandbox: str,
    env: tuple[tuple[str, str], ...],
    **options: Any,
) -> None:
    """Snapshot a sandbox now, and make sandboxes of that snapshot.

    Exits with 1 when some of the copies could not be made; the others are there.
    """
    with app.client() as client, app.waiting("cloning the sandbox"):
        result = client.sandboxes.clone(sandbox, env=dict(env), **options)
    if app.json:
        print_json(
            {
                "snapshot": result.snapshot,
                "sandbox": result.sandboxes[0] if result.sandboxes else None,
                "sandboxes": result.sandboxes,
                "errors": result.errors,
            }
        )
    else:
        shot = result.snapshot
        click.echo(f"snapshot {shot.id}  {printable(shot.name)}  ({shot.consistency})")
        for one in result.sandboxes:
            click.echo(f"sandbox  {one.id}  {printable(one.name)}  ({one.state})")
        for error in result.errors:
            click.echo(f"error: a copy is missing: {printable(error.message)}", err=True)
    if result.errors:
        ctx.exit(1)


@sandbox.command()
@sandbox_argument
@click.option("--snapshot", required=True, metavar="SNAPSHOT", help="One of this sandbox's own.")
@identity_option
@ready_options
@common
@pass_app
def revert(app: App, /, sandbox: str, snapshot: str, **options: Any) -> None:
    """Put a sandbox back onto one of its snapshots; it keeps its id.

    What it was before is kept in a safety snapshot for 24 hours.
    """
    with app.client() as client, app.waiting("reverting the sandbox"):
        result = client.sandboxes.revert(sandbox, snapshot, **options)
    if app.json:
        print_json(result)
        return
    print_details(result.sandbox)
    safety = result.safety_snapshot
    app.note(f"what it was before: snapshot {safety.id}, until {moment(safety.expires_at)}")
