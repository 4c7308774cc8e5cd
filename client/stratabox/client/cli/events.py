"""`stratabox events`: what happens to sandboxes, snapshots, volumes, images and jobs."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common, parse_duration, parse_rfc3339
from stratabox.client.cli.output import jsonable, moment, printable
from stratabox.client.event_records import Happened, Subject
from stratabox.client.records import EventType

if TYPE_CHECKING:
    from collections.abc import Iterable

_WORDS = [subject.value for subject in Subject if subject is not Subject.UNKNOWN]


class _Since(click.ParamType[datetime]):
    name = "since"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Read a span of time that ends now, or a point of time."""
        text = str(value)
        try:
            return datetime.now(UTC) - timedelta(seconds=parse_duration(text))
        except (ValueError, OverflowError):
            pass
        try:
            return parse_rfc3339(text)
        except ValueError:
            self.fail(f"{text!r} is neither a span as 10m nor a time as 2026-03-20T12:00:00Z")


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on.")
@click.option(
    "--since",
    type=_Since(),
    metavar="DURATION|RFC3339",
    help="As 10m, or 2026-03-20T12:00:00Z: what happened since. All that is remembered; with "
    "--follow none of the past.",
)
@click.option(
    "--kind", "subjects", type=click.Choice(_WORDS), multiple=True,
    help="Only what happens to these; several times for several.",
)  # fmt: skip
@common
@pass_app
def events(app: App, follow: bool, since: datetime | None, subjects: tuple[str, ...]) -> None:
    """Print what happened, oldest first: what is new, gone, or changed its name or state.

    The daemon remembers some thousand events since its start. With --follow it ends with ^C. With
    --json, one object a line.
    """
    with app.client() as client:
        _print(app, client.events.watch(subjects, since=since, follow=follow))


def _print(app: App, found: Iterable[Happened]) -> None:
    for each in found:
        click.echo(json.dumps(jsonable(each)) if app.json else _line(each))
        sys.stdout.flush()


def _line(each: Happened) -> str:
    state = f"{each.state}, ready" if each.ready else each.state
    what = "deleted" if each.type is EventType.DELETED else state
    if each.type is EventType.CREATED:
        what = f"new, {state}"
    reason = f" ({each.reason})" if each.reason else ""
    text = f"{moment(each.time)}  {each.subject:<8}  {each.name}  {what}{reason}  {each.id}"
    return printable(text)
