"""`stratabox df`: what takes how much of the disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common
from stratabox.client.cli.output import print_json, print_table, size
from stratabox.client.host_records import DiskUsage
from stratabox.client.records import Image, SandboxRecord, Snapshot
from stratabox.client.volume_records import Volume, VolumeSnapshot

_Record = Image | SandboxRecord | Snapshot | Volume | VolumeSnapshot


@click.command()
@click.option("--verbose", is_flag=True, help="Each record, the largest of its own first.")
@common
@pass_app
def df(app: App, verbose: bool) -> None:
    """Say what the daemon keeps and what takes how much of the disk.

    Each file counts once, for the first that it belongs to. With --verbose, OWN is what comes free
    when that one alone is deleted, and LOGICAL what it would take alone.
    """
    with app.client() as client, app.waiting("looking at all files"):
        usage = client.disk_usage()
        records: dict[str, Sequence[_Record]] = {}
        if verbose:
            records = {
                "images": _by_own(client.images.list()),
                "sandboxes": _by_own(client.sandboxes.list()),
                "snapshots": _by_own(client.snapshots.list()),
                "volumes": _by_own(client.volumes.list()),
                "volume snapshots": _by_own(client.volumes.list_snapshots()),
            }
    if app.json:
        told = {
            kind.replace(" ", "_"): [
                {"id": one.id, "name": one.name, "space": one.space} for one in found
            ]
            for kind, found in records.items()
        }
        print_json({"usage": usage, **told})
        return
    print_table(
        ("WHAT", "SIZE", "FILES"),
        [
            (part.name.replace("_", " "), size(part.bytes), str(part.files))
            for part in usage.parts
            if part.bytes or part.files
        ]
        + [("total", size(usage.total_bytes), str(sum(part.files for part in usage.parts)))],
    )
    click.echo(f"\n{_limits(usage)}")
    if verbose:
        click.echo()
        print_table(
            ("KIND", "ID", "NAME", "OWN", "SHARED", "LOGICAL"),
            (_row(kind, one) for kind, found in records.items() for one in found),
        )


def _limits(usage: DiskUsage) -> str:
    full = 100 * (1 - usage.filesystem_free_bytes / max(1, usage.filesystem_bytes))
    budget = (
        f"{size(usage.budget_used_bytes)} of the budget of {size(usage.budget_bytes)}"
        if usage.budget_bytes
        else "no budget"
    )
    return (
        f"{budget}; file system {full:.1f} % full, {size(usage.filesystem_free_bytes)} free;"
        f" nothing new is begun beyond {usage.high_water_percent} %"
    )


def _by_own(records: Iterable[_Record]) -> list[_Record]:
    return sorted(records, key=lambda one: one.space.own_bytes, reverse=True)


def _row(kind: str, one: _Record) -> tuple[str, ...]:
    takes = one.space
    return (
        kind.removesuffix("es") if kind == "sandboxes" else kind.removesuffix("s"),
        one.id,
        one.name,
        size(takes.own_bytes),
        size(takes.shared_bytes),
        size(takes.logical_bytes),
    )
