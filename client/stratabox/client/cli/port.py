"""`stratabox sandbox port`: connections into guests, and out of them, without a network."""

from __future__ import annotations

from typing import Any

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common
from stratabox.client.cli.output import print_details, print_json, print_table
from stratabox.client.port_records import Endpoint, Port, PortDirection

_TARGET = "[LISTENS:]TARGET"


@click.group()
def port() -> None:
    """Forward TCP ports and Unix sockets into a guest, and out of it.

    Each end is PORT, ADDRESS:PORT or /PATH, as in 8080:80, 127.0.0.1:8080:80, /tmp/db.sock:5432.
    """


def _mode(ctx: click.Context, param: click.Parameter, value: str | None) -> int:
    try:
        return int(value, 8) if value else 0
    except ValueError:
        raise click.BadParameter("permissions are octal, as 0660") from None


@port.command()
@click.argument("words", nargs=-1, required=True, metavar=f"[SANDBOX] {_TARGET}")
@click.option("--session", metavar="SANDBOX", help="Instead of the argument.")
@click.option(
    "--to-host",
    is_flag=True,
    help="The guest listens, and what listens on the daemon's host is reached.",
)
@click.option("--mode", callback=_mode, metavar="MODE", help="Of the Unix socket; 0600.")
@common
@pass_app
def add(app: App, words: tuple[str, ...], session: str | None, to_host: bool, mode: int) -> None:
    """Listen, and lead every connection to TARGET, until removed or the sandbox is over.

    Where LISTENS is not given, a free port of the host's loopback is chosen; in a guest it is the
    same as TARGET.
    """
    from stratabox.client._ports import parse_pair

    sandbox, text = split_words(words, session)
    listens, target = parse_pair(text)
    with app.client() as client:
        if to_host:
            made = client.ports.add(
                sandbox,
                listens or target,
                target,
                direction=PortDirection.TO_HOST,
                mode=mode,
            )
        else:
            made = client.ports.add(sandbox, target, listens or 0, mode=mode)
    if app.json:
        print_json(_as_json(made))
        return
    print_details(
        {
            "id": made.id,
            "listens": f"{listening_side(made)[0]} ({'host' if not to_host else 'guest'})",
            "leads_to": f"{listening_side(made)[1]} ({'guest' if not to_host else 'host'})",
            "state": _state(made),
        }
    )


@port.command("list")
@click.argument("sandbox", required=False)
@click.option("--session", metavar="SANDBOX", help="Instead of the argument.")
@common
@pass_app
def list_(app: App, sandbox: str | None, session: str | None) -> None:
    """List the ports of one sandbox, or of all, oldest first."""
    with app.client() as client:
        found = client.ports.list(sandbox or session)
    if app.json:
        print_json({"ports": [_as_json(one) for one in found]})
        return
    print_table(
        ("ID", "SANDBOX", "DIRECTION", "LISTENS", "LEADS TO", "STATE", "OPEN"),
        (
            (
                one.id,
                one.sandbox_id,
                one.direction,
                *listening_side(one),
                _state(one),
                str(one.connections),
            )
            for one in found
        ),
    )


@port.command()
@click.argument("port", metavar="PORT")
@common
@pass_app
def remove(app: App, port: str) -> None:
    """Stop listening, and close the connections. PORT is an id, as `port list` shows it."""
    with app.client() as client:
        client.ports.remove(port)
    if app.json:
        print_json({"id": port, "removed": True})
    else:
        click.echo(f"removed port {port}")


@port.command()
@click.argument("words", nargs=-1, required=True, metavar=f"[SANDBOX] {_TARGET}...")
@click.option("--session", metavar="SANDBOX", help="Instead of the argument.")
@common
@pass_app
def forward(app: App, words: tuple[str, ...], session: str | None) -> None:
    """Listen here, where this runs, rather than at the daemon's host; until interrupted.

    Where LISTENS is not given, a free port of the loopback is chosen.
    """
    from stratabox.client._ports import parse_pair
    from stratabox.client.cli import port_forward

    if session is None:
        session, *rest = words
    else:
        rest = list(words)
    if not rest:
        raise click.UsageError(f"Missing {_TARGET}.")
    port_forward.run(app, session, [parse_pair(text) for text in rest])


def split_words(words: tuple[str, ...], session: str | None) -> tuple[str, str]:
    """Tell the sandbox from the one word behind it."""
    match (*words, session):
        case (text, str(sandbox)) | (sandbox, text, None):
            return str(sandbox), str(text)
    raise click.UsageError(f"Name the sandbox (or --session) and one {_TARGET}.")


def listening_side(one: Port) -> tuple[str, str]:
    """Write where a port listens, and where it leads to."""
    ends: tuple[Endpoint, Endpoint] = (one.host, one.guest)
    if one.direction is PortDirection.TO_HOST:
        ends = (one.guest, one.host)
    return str(ends[0]), str(ends[1])


def _state(one: Port) -> str:
    if one.listening:
        return "listening"
    return one.problem or "waits for the guest"


def _as_json(one: Port) -> dict[str, Any]:
    listens, leads_to = listening_side(one)
    return {**vars(one), "mode": f"{one.mode:04o}", "listens": listens, "leads_to": leads_to}
