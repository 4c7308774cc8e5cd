"""`export` and `import` of snapshots and images: commands of those two nouns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

import click

from stratabox.client.archives import ExportResult
from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common
from stratabox.client.cli.output import print_details, print_json, printable, size
from stratabox.client.cli.progress import bar

_target_argument = click.argument(
    "file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path)
)
_source_argument = click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
)
_DASH = Path("-")


@click.command("export")
@click.argument("snapshot")
@_target_argument
@click.option("--since", metavar="SNAPSHOT", help="Leave out the layers that this one has.")
@click.option("--memory", is_flag=True, help="With its saved memory.")
@click.option("--env", is_flag=True, help="With the environment of its commands.")
@common
@pass_app
def export_snapshot(
    app: App, snapshot: str, file: Path, since: str | None, memory: bool, env: bool
) -> None:
    """Write a snapshot to FILE (- is stdout), as one archive for another store.

    Broken off, it leaves FILE.part; the same command again goes on there.
    """
    with app.client() as client, bar(app, "exporting", in_bytes=True) as progress:
        result = client.snapshots.export(
            snapshot, _target(file), since=since, memory=memory, env=env, progress=progress
        )
    _tell(app, result)


@click.command("import")
@_source_argument
@click.option("--name", help="Free text; as it was called.")
@click.option("--trust", is_flag=True, help="Take its memory, too, which nobody can look into.")
@common
@pass_app
def import_snapshot(app: App, file: Path, name: str | None, trust: bool) -> None:
    """Take a snapshot from an archive in FILE (- is stdin). Nothing in it is trusted.

    Its memory comes only with --trust; without, its disks are as after a power cut.
    """
    with app.client() as client, bar(app, "importing", in_bytes=True) as progress:
        result = client.snapshots.import_file(
            _source(file), name=name, trust=trust, progress=progress
        )
    if app.json:
        print_json(result)
        return
    print_details(result.snapshot)
    if result.left_out is not None:
        app.note(f"note: {printable(result.left_out.message)} (--trust)")


@click.command("export")
@click.argument("image")
@_target_argument
@common
@pass_app
def export_image(app: App, image: str, file: Path) -> None:
    """Write an image to FILE (- is stdout), as one archive for another store.

    Broken off, it leaves FILE.part; the same command again goes on there.
    """
    with app.client() as client, bar(app, "exporting", in_bytes=True) as progress:
        result = client.images.export(image, _target(file), progress=progress)
    _tell(app, result)


def import_image(app: App, file: Path, name: str | None) -> None:
    """Take an image from an archive: what `image import --format archive` does."""
    with app.client() as client, bar(app, "importing", in_bytes=True) as progress:
        record = client.images.import_archive(_source(file), name=name, progress=progress)
    (print_json if app.json else print_details)(record)


def _target(file: Path) -> Path | BinaryIO:
    if file != _DASH:
        return file
    if sys.stdout.isatty():
        raise click.UsageError("an archive is not for a terminal: name a file, or pipe it on")
    return sys.stdout.buffer


def _source(file: Path) -> Path | BinaryIO:
    return sys.stdin.buffer if file == _DASH else file


def _tell(app: App, result: ExportResult) -> None:
    if result.path is None:  # stdout has the archive
        app.note(f"{size(result.archive_bytes)} written")
    elif app.json:
        print_json({**vars(result), "path": str(result.path)})
    else:
        more = f", {size(result.resumed_bytes)} of it before" if result.resumed_bytes else ""
        click.echo(
            f"wrote {printable(str(result.path))}: {size(result.archive_bytes)}"
            f" for {size(result.content_bytes)}{more}"
        )
