"""`stratabox sandbox files`: looking at files in guests, and changing them."""

from __future__ import annotations

import json
import sys

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.guest_paths import (
    GUEST_PATH,
    InGuest,
    as_json,
    mode_text,
    shown,
    user_option,
)
from stratabox.client.cli.options import common
from stratabox.client.cli.output import moment, print_details, print_json, print_table, printable
from stratabox.client.file_records import FileChange, FileChangeType, FileInfo

_path_argument = click.argument("path", type=GUEST_PATH, metavar="SANDBOX:/PATH")


class _Octal(click.ParamType):  # type: ignore[type-arg]  # generic only in newer stubs
    name = "MODE"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        try:
            mode = int(str(value), 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o7777:
            self.fail(f"{value!r} is no mode as 755 or 0644", param, ctx)
        return mode


_MODE = _Octal()


@click.group()
def files() -> None:
    """Look at files in guests, and change them. `sandbox cp` copies."""


@files.command("ls")
@_path_argument
@user_option
@common
@pass_app
def list_(app: App, path: InGuest, user: str | None) -> None:
    """List a directory, or one file."""
    with app.client() as client:
        found = client.files.stat(path.sandbox, path.path, user=user)
        entries = [found]
        if found.is_directory:
            entries = client.files.list(path.sandbox, path.path, user=user)
    if app.json:
        print_json({"files": [as_json(one) for one in entries]})
        return
    print_table(
        ("MODE", "OWNER", "SIZE", "MODIFIED", "NAME"),
        (
            (
                mode_text(one),
                f"{one.uid}:{one.gid}",
                str(one.size),
                moment(one.modified_at),
                shown(one.path),
            )
            for one in entries
        ),
    )


@files.command()
@_path_argument
@click.option("--no-follow", is_flag=True, help="Of a link, tell of the link itself.")
@user_option
@common
@pass_app
def stat(app: App, path: InGuest, no_follow: bool, user: str | None) -> None:
    """Tell of one file."""
    with app.client() as client:
        _show(app, client.files.stat(path.sandbox, path.path, follow=not no_follow, user=user))


@files.command()
@_path_argument
@click.option("--offset", type=click.IntRange(0), default=0, help="Where to begin, in bytes.")
@click.option("--length", type=click.IntRange(0), help="How many bytes at most.")
@user_option
@common
@pass_app
def cat(app: App, path: InGuest, offset: int, length: int | None, user: str | None) -> None:
    """Write a file's content to stdout."""
    with app.client() as client:
        for piece in client.files.stream(
            path.sandbox, path.path, offset=offset, length=length, user=user
        ):
            sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


@files.command()
@_path_argument
@click.option("--append", is_flag=True, help="Behind what is there, in place.")
@click.option("--mode", type=_MODE, metavar="MODE", help="The permission bits, in octal.")
@click.option("--parents", "-p", is_flag=True, help="Make the directories above it.")
@user_option
@common
@pass_app
def write(
    app: App, path: InGuest, append: bool, mode: int | None, parents: bool, user: str | None
) -> None:
    """Write stdin to a file: it is there whole in the end, or is as it was."""
    how = "append" if append else "replace"
    with app.client() as client:
        info = client.files.write(
            path.sandbox, path.path, sys.stdin.buffer,
            write_mode=how, mode=mode, parents=parents, user=user,
        )  # fmt: skip
    _show(app, info)


@files.command()
@_path_argument
@click.option("--parents", "-p", is_flag=True, help="Those above, too; it may be there.")
@click.option("--mode", type=_MODE, metavar="MODE", help="The permission bits, in octal.")
@user_option
@common
@pass_app
def mkdir(app: App, path: InGuest, parents: bool, mode: int | None, user: str | None) -> None:
    """Make a directory."""
    with app.client() as client:
        info = client.files.make_directory(
            path.sandbox, path.path, parents=parents, mode=mode, user=user
        )
    _show(app, info)


@files.command()
@_path_argument
@click.option("--recursive", "-r", is_flag=True, help="A directory with all that is in it.")
@user_option
@common
@pass_app
def rm(app: App, path: InGuest, recursive: bool, user: str | None) -> None:
    """Remove a file, a link, or an empty directory."""
    with app.client() as client:
        client.files.remove(path.sandbox, path.path, recursive=recursive, user=user)
    if app.json:
        print_json({"path": path.path, "removed": True})


@files.command()
@_path_argument
@click.argument("target", metavar="/PATH")
@click.option("--keep", is_flag=True, help="Not over what is there.")
@user_option
@common
@pass_app
def mv(app: App, path: InGuest, target: str, keep: bool, user: str | None) -> None:
    """Give a file or directory another path in the same guest."""
    with app.client() as client:
        _show(app, client.files.move(path.sandbox, path.path, target, keep=keep, user=user))


@files.command()
@click.argument("mode", type=_MODE)
@_path_argument
@click.option("--recursive", "-r", is_flag=True, help="With all that is in it.")
@user_option
@common
@pass_app
def chmod(app: App, mode: int, path: InGuest, recursive: bool, user: str | None) -> None:
    """Change the permission bits, given in octal."""
    with app.client() as client:
        info = client.files.change(
            path.sandbox, path.path, mode=mode, recursive=recursive, user=user
        )
    _show(app, info)


@files.command()
@click.argument("owner", metavar="OWNER[:GROUP]")
@_path_argument
@click.option("--recursive", "-r", is_flag=True, help="With all that is in it.")
@user_option
@common
@pass_app
def chown(app: App, owner: str, path: InGuest, recursive: bool, user: str | None) -> None:
    """Change owner and group, given by name or number."""
    name, _, group = owner.partition(":")
    with app.client() as client:
        info = client.files.change(
            path.sandbox, path.path,
            owner=name or None, group=group or None, recursive=recursive, user=user,
        )  # fmt: skip
    _show(app, info)


@files.command()
@click.argument("target")
@_path_argument
@user_option
@common
@pass_app
def ln(app: App, target: str, path: InGuest, user: str | None) -> None:
    """Make a symbolic link that leads to TARGET."""
    with app.client() as client:
        _show(app, client.files.symlink(path.sandbox, path.path, target, user=user))


@files.command()
@_path_argument
@click.option("--recursive", "-r", is_flag=True, help="With all directories in it.")
@user_option
@common
@pass_app
def watch(app: App, path: InGuest, recursive: bool, user: str | None) -> None:
    """Print changes of a directory's entries, or of one file, until interrupted."""
    with app.client() as client:
        for one in client.files.watch(path.sandbox, path.path, recursive=recursive, user=user):
            if isinstance(one, FileChange):
                _print_change(app, one)
            elif app.json:
                click.echo(json.dumps({"method": one}))
            else:
                app.note(f"watching by {one}")


def _print_change(app: App, change: FileChange) -> None:
    if app.json:
        click.echo(json.dumps(as_json(change)))
    elif change.type is FileChangeType.OVERFLOW:
        click.echo("overflow  more has changed than could be told: look again")
    elif change.old_path:
        old, new = printable(shown(change.old_path)), printable(shown(change.path))
        click.echo(f"moved     {old} -> {new}")
    else:
        click.echo(f"{change.type:9} {printable(shown(change.path))}")
    sys.stdout.flush()


def _show(app: App, info: FileInfo) -> None:
    if app.json:
        print_json(as_json(info))
        return
    print_details(
        {
            "path": shown(info.path),
            "kind": info.kind,
            "size_bytes": info.size,
            "mode": mode_text(info),
            "owner": f"{info.uid}:{info.gid}",
            "modified_at": moment(info.modified_at),
        }
    )
