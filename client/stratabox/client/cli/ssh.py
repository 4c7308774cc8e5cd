"""`sandbox ssh`, `ssh-config`, `sandbox ssh-proxy` and `sandbox ssh-key`: guests for stock ssh."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stratabox.client import ssh_access
from stratabox.client.addresses import default_address
from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common, sandbox_argument
from stratabox.client.cli.output import print_json, print_table
from stratabox.client.errors import InvalidStateError, StrataboxError
from stratabox.client.records import SandboxRecord, SandboxState

if TYPE_CHECKING:
    from stratabox.client._dial import Connection

_PIECE = 64 << 10

_user_option = click.option(
    "--user", default="root", metavar="USER", help="A user of the guest; root."
)


@click.command(
    "ssh",
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
    options_metavar="[OPTIONS]",
)
@common
@click.argument("sandbox", metavar="[USER@]SANDBOX")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[SSH ARGUMENTS]...")
@pass_app
def ssh(app: App, sandbox: str, arguments: tuple[str, ...]) -> None:
    """Log in to a guest by stock ssh, or run a command there.

    Everything behind SANDBOX is ssh's own: -l USER, -L 8080:localhost:80, -- COMMAND. The guest
    needs an sshd, but none that listens, and no network. Exits as ssh does.
    """
    user, at, name = sandbox.rpartition("@")
    with app.client() as client:
        record: SandboxRecord = client.sandboxes.get(name)
    if record.state != SandboxState.RUNNING:
        raise InvalidStateError(f"sandbox {record.name!r} is {record.state}: start it first")
    where = ssh_access.folder()
    ssh_access.identity(where)
    words = ["-l", user, *arguments] if at else arguments
    line = ssh_access.command(where, record.id, _address(app), words, _workspace(app))
    try:
        os.execvp(line[0], line)
    except FileNotFoundError:
        raise StrataboxError(
            "there is no ssh here: install openssh-client", reason="TOOL_MISSING"
        ) from None


@click.command("ssh-config")
@_user_option
@common
@pass_app
def ssh_config(app: App, user: str) -> None:
    """Print a configuration by which stock ssh, scp, sftp and rsync reach all running guests.

    One Host entry for each, by its id and its name: stratabox ssh-config >FILE; ssh -F FILE NAME
    """
    with app.client() as client:
        found = client.sandboxes.list(states=[SandboxState.RUNNING])
    where = ssh_access.folder()
    ssh_access.identity(where)
    ssh_access.prune(where)
    if app.json:
        address, inside = _address(app), _workspace(app)
        entries = {
            one.id: dict(ssh_access.options(where, one.id, address, workspace=inside))
            for one in found
        }
        print_json({"hosts": entries})
        return
    click.echo(ssh_access.config(where, found, _address(app), user, _workspace(app)), nl=False)


@click.command("ssh-proxy", hidden=True)
@_user_option
@common
@click.argument("sandbox")
@pass_app
def ssh_proxy(app: App, user: str, sandbox: str) -> None:
    """Carry one connection of ssh between stdin and stdout, and a session of the guest's sshd."""
    where = ssh_access.folder()
    key = ssh_access.public_file(ssh_access.identity(where)).read_text(encoding="utf-8")
    with (
        app.client() as client,
        client.ports.dial_ssh(sandbox, user=user, public_key=key.strip()) as connection,
    ):
        # Before its first word ssh looks at no known hosts.
        ssh_access.write_known_hosts(where, connection.sandbox_id, connection.host_keys)
        sender = threading.Thread(target=_send, args=(connection,), daemon=True)
        sender.start()
        for piece in connection:
            _write(piece)


@click.group("ssh-key")
def ssh_key() -> None:
    """Say by which keys users of a guest may log in, beside your own."""


@ssh_key.command("list")
@sandbox_argument
@common
@pass_app
def list_keys(app: App, sandbox: str) -> None:
    """List the keys, by user."""
    with app.client() as client:
        found = client.ssh.authorized_keys(sandbox)
    if app.json:
        print_json({"keys": found})
        return
    print_table(
        ("USER", "FINGERPRINT", "TYPE", "COMMENT"),
        (
            (one.user, one.fingerprint, one.public_key.split()[0], _comment(one.public_key))
            for one in found
        ),
    )


@ssh_key.command("set")
@click.argument("sandbox")
@click.argument("files", nargs=-1, type=click.Path(dir_okay=False, path_type=Path))
@_user_option
@common
@pass_app
def set_keys(app: App, sandbox: str, files: tuple[Path, ...], user: str) -> None:
    """Replace a user's keys by those in FILES (.pub files); by none, where there are no FILES."""
    lines = [
        line.strip()
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    with app.client() as client:
        found = client.ssh.set_authorized_keys(sandbox, lines, user=user)
    if app.json:
        print_json({"keys": found})
    else:
        click.echo(f"{len(found)} keys let {user} in")


@ssh_key.command("host")
@sandbox_argument
@common
@pass_app
def host_keys(app: App, sandbox: str) -> None:
    """Print the guest's own host keys, as the daemon has learnt them from it."""
    with app.client() as client:
        found = client.ssh.host_keys(sandbox)
    if app.json:
        print_json({"host_keys": found})
    else:
        click.echo("\n".join(found))


def _comment(public_key: str) -> str:
    _, _, *comment = public_key.split(None, 2)
    return comment[0] if comment else "-"


def _address(app: App) -> str:
    return app.address or default_address()


def _workspace(app: App) -> str | None:
    return app.workspace or os.environ.get("STRATABOX_WORKSPACE")


def _send(connection: Connection) -> None:
    try:
        while data := os.read(0, _PIECE):
            connection.write(data)
        connection.write_eof()
    except StrataboxError:
        pass  # whoever reads is told
    except OSError:
        connection.close()


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
