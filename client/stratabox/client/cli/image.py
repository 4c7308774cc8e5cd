"""`stratabox image`: what sandboxes start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from stratabox.client.cli import transfer
from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common, paging_options
from stratabox.client.cli.output import (
    moment,
    print_details,
    print_json,
    print_table,
    printable,
    size,
)
from stratabox.client.cli.progress import bar
from stratabox.client.records import BuildProgress, DiskFormat, Image

_ARCHIVE = "archive"
_image_argument = click.argument("image")
_replace_option = click.option(
    "--replace", is_flag=True, help="Take the name from an image that has it."
)


@click.group()
def image() -> None:
    """Build, import and remove images."""


@image.group()
def build() -> None:
    """Build an image from Debian's packages."""


def _show(app: App, record: Image) -> None:
    (print_json if app.json else print_details)(record)


@build.command()
@click.option("--release", metavar="NAME", help="Debian's code name; bookworm.")
@click.option("--name", help="Unique among images; debian.")
@click.option("--include", multiple=True, metavar="PACKAGE,...", help="More Debian packages.")
@_replace_option
@common
@pass_app
def debian(
    app: App, release: str | None, name: str | None, include: tuple[str, ...], replace: bool
) -> None:
    """Build a Debian guest: systemd, the guest agent, sshd, Python. Takes minutes."""
    packages = [one for some in include for one in some.split(",") if one]
    with app.client() as client, _steps(app) as progress:
        record = client.images.build_debian(
            name=name, release=release, include=packages, replace=replace, progress=progress
        )
    _show(app, record)


@build.command()
@click.option("--name", help="Unique among images; tiny.")
@_replace_option
@common
@pass_app
def tiny(app: App, name: str | None, replace: bool) -> None:
    """Build a guest of a few MB: kernel, busybox, guest agent. Takes seconds."""
    with app.client() as client, _steps(app) as progress:
        record = client.images.build_tiny(name=name, replace=replace, progress=progress)
    _show(app, record)


@image.command("import")
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
)
@click.option("--name", help="Unique among images; an archive has one of its own.")
@click.option(
    "--format",
    type=click.Choice([*(str(one) for one in DiskFormat), _ARCHIVE]),
    help="How to read the file; what its suffix says (.qcow2, .raw, .img). An archive, as 'image"
    " export' writes it, must be called one, and may come from stdin (-).",
)
@click.option(
    "--cloud-init",
    is_flag=True,
    help="Its guests run cloud-init: sandboxes get a seed, with --user-data and --ssh-key.",
)
@common
@pass_app
def import_(app: App, file: Path, name: str | None, format: str | None, cloud_init: bool) -> None:
    """Take a disk image that boots by itself, as clouds use them; or an archive."""
    if format == _ARCHIVE:
        if cloud_init:
            raise click.UsageError("an archive says itself whether its guests run cloud-init.")
        transfer.import_image(app, file, name)
        return
    if str(file) == "-":
        raise click.UsageError("only an archive can come from stdin.")
    if name is None:
        raise click.UsageError("a disk has no name: give --name.")
    if format is None:
        from stratabox.client._images import format_by_suffix

        guess = format_by_suffix(file)
        if guess is None:
            raise click.UsageError(f"{file.name!r} does not tell the format: give --format.")
        app.note(f"reading {printable(file.name)} as {guess}, as its suffix says")
    with app.client() as client, bar(app, "sending", in_bytes=True) as progress:
        record = client.images.import_file(
            file, name=name, format=format, cloud_init=cloud_init, progress=progress
        )
    _show(app, record)


@image.command("list")
@paging_options
@common
@pass_app
def list_(app: App, limit: int | None, page_token: str | None) -> None:
    """List images, newest first."""
    token: str | None = None
    with app.client() as client:
        if limit is None and page_token is None:
            found = client.images.list()
        else:
            page = client.images.list_page(page_size=limit, page_token=page_token)
            found, token = list(page.items), page.next_page_token
    if app.json:
        print_json({"images": found, "next_page_token": token})
        return
    print_table(
        ("ID", "NAME", "STATE", "ORIGIN", "SIZE", "ON DISK", "CREATED"),
        (
            (
                one.id,
                one.name,
                one.state,
                one.origin,
                size(one.size_bytes),
                size(one.layer_bytes),
                moment(one.created_at),
            )
            for one in found
        ),
    )
    if token:
        app.note(f"more: --page-token {token}")


@image.command()
@_image_argument
@common
@pass_app
def get(app: App, image: str) -> None:
    """Print one image."""
    with app.client() as client:
        _show(app, client.images.get(image))


@image.command()
@_image_argument
@common
@pass_app
def delete(app: App, image: str) -> None:
    """Remove an image; refused while something needs it."""
    with app.client() as client:
        record = client.images.get(image)
        result = client.images.delete(record.id)
    if app.json:
        print_json(
            {
                "id": record.id,
                "name": record.name,
                "deleted": True,
                "freed_bytes": result.freed_bytes,
            }
        )
    else:
        freed = size(result.freed_bytes)
        click.echo(f"deleted image {printable(record.name)} ({record.id}): {freed} came free")


image.add_command(transfer.export_image)


@contextmanager
def _steps(app: App) -> Iterator[Callable[[BuildProgress], None]]:
    """Show the steps of a build: a bar on a terminal, a line for each step elsewhere."""
    if not app.animated:
        said: list[str] = []

        def say(progress: BuildProgress) -> None:
            if said[-1:] != [progress.step]:
                said.append(progress.step)
                app.note(printable(progress.step))

        yield say
        return
    with bar(app, "building") as show:

        def draw(progress: BuildProgress) -> None:
            share = progress.fraction
            show(int((share or 0) * 1000), 1000 if share is not None else 0, progress.step)

        yield draw
