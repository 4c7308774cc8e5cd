"""`stratabox sandbox cp`: files and folders between this host and guests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.guest_paths import InGuest, guest_path, user_option
from stratabox.client.cli.options import SIZE, common
from stratabox.client.cli.output import print_json, printable, size
from stratabox.client.cli.progress import bar
from stratabox.client.file_records import CopyResult

if TYPE_CHECKING:
    from stratabox.client.sync import Client

Progress = Callable[..., None]


def _side(ctx: click.Context, param: click.Parameter, value: str) -> InGuest | str:
    try:
        return guest_path(value) or value
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


@click.command("cp")
@click.argument("source", callback=_side)
@click.argument("target", callback=_side)
@click.option("--recursive", "-r", is_flag=True, help="Folders, with all that is in them.")
@click.option("--all-links", is_flag=True, help="Also links that lead out of the copy.")
@click.option("--limit", type=SIZE, metavar="SIZE", help="Take no more; the room at the target.")
@user_option
@common
@pass_app
@click.pass_context
def copy(
    ctx: click.Context,
    app: App,
    source: InGuest | str,
    target: InGuest | str,
    recursive: bool,
    all_links: bool,
    limit: int | None,
    user: str | None,
) -> None:
    """Copy SOURCE to TARGET; a guest's side is SANDBOX:/PATH, and - is stdin or stdout.

    As cp does: into a folder that is there, and else under the name that is given; SOURCE/. is
    copied without its own name. Modes, times and links are kept. Nothing outside of TARGET is
    touched, whatever a guest sends: devices are left out, and links that lead out of the copy.
    Exits with 1 when something was left out.
    """
    if isinstance(source, str) and isinstance(target, str):
        raise click.UsageError("neither side is in a guest: that would be SANDBOX:/PATH")
    with app.client() as client, bar(app, "copying", in_bytes=True) as progress:
        if isinstance(source, str):
            assert isinstance(target, InGuest)
            result = _in(client, source, target, recursive, user, progress)
        elif isinstance(target, str):
            options = {"recursive": recursive, "all_links": all_links, "limit": limit}
            result = _out(client, source, target, options, user, progress)
        else:
            from stratabox.client.cli.between import between

            result = between(client, source, target, recursive, user, progress)
    _tell(app, result, to_stdout=target == "-")
    if result.incomplete:
        ctx.exit(1)


def _in(
    client: Client,
    source: str,
    target: InGuest,
    recursive: bool,
    user: str | None,
    progress: Progress,
) -> CopyResult:
    if source != "-":
        return client.files.upload(
            target.sandbox, source, target.path,
            recursive=recursive, user=user, progress=progress,
        )  # fmt: skip
    info = client.files.write(target.sandbox, target.path, sys.stdin.buffer, user=user)
    return CopyResult(entries=1, size_bytes=info.size, warnings=(), incomplete=False)


def _out(
    client: Client,
    source: InGuest,
    target: str,
    options: dict[str, Any],
    user: str | None,
    progress: Progress,
) -> CopyResult:
    if target != "-":
        return client.files.download(
            source.sandbox, source.path, target, user=user, progress=progress, **options
        )
    count = sum(map(_write_out, client.files.stream(source.sandbox, source.path, user=user)))
    return CopyResult(entries=1, size_bytes=count, warnings=(), incomplete=False)


def _write_out(piece: bytes) -> int:
    sys.stdout.buffer.write(piece)
    return len(piece)


def counted(pieces: Iterator[bytes], progress: Progress, total: int) -> Iterator[bytes]:
    """Give pieces on, and tell how many bytes they were."""
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece)
        progress(done, total)


def _tell(app: App, result: CopyResult, *, to_stdout: bool) -> None:
    if to_stdout:
        sys.stdout.buffer.flush()
        return
    if app.json:
        print_json(result)
        return
    for warning in result.warnings:
        app.note(f"warning: {printable(warning)}")
    one = result.entries == 1
    click.echo(f"copied {result.entries} {'file' if one else 'files'}, {size(result.size_bytes)}")
