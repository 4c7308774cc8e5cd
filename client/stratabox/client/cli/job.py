"""`stratabox job`."""

from __future__ import annotations

from collections.abc import Callable

import click

from stratabox.client.background import Job, JobState
from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common
from stratabox.client.cli.output import moment, print_details, print_json, print_table, size

_job_argument = click.argument("job")
_ACTIVE = (JobState.QUEUED, JobState.RUNNING, JobState.PAUSED)


@click.group()
def job() -> None:
    """Look at jobs in the background, hold them, give them up."""


@job.command("list")
@click.option(
    "--all", "include_over", is_flag=True, help="Those of the last day that are over too."
)
@common
@pass_app
def list_(app: App, include_over: bool) -> None:
    """List jobs, oldest first."""
    with app.client() as client:
        found = client.jobs.list(include_over=include_over)
    if app.json:
        print_json({"jobs": found})
        return
    print_table(
        ("ID", "KIND", "STATE", "DONE", "OF", "SNAPSHOTS", "SANDBOXES", "CREATED", "REASON"),
        (_row(one) for one in found),
    )


def _row(one: Job) -> tuple[str, ...]:
    return (
        one.id,
        one.kind,
        one.state,
        size(one.done_bytes),
        size(one.total_bytes) if one.total_bytes else "-",
        str(len(one.snapshot_ids)),
        str(len(one.sandbox_ids)),
        moment(one.created_at),
        one.reason or "-",
    )


@job.command()
@_job_argument
@common
@pass_app
def get(app: App, job: str) -> None:
    """Print one job."""
    with app.client() as client:
        _show(app, client.jobs.get(job))


@job.command()
@click.argument("job", required=False)
@click.option("--all", "every", is_flag=True, help="All that there are now.")
@common
@pass_app
def pause(app: App, job: str | None, every: bool) -> None:
    """Hold a job where it is, until it is resumed."""
    with app.client() as client:
        _each(app, job, every, client.jobs.list, client.jobs.pause)


@job.command()
@click.argument("job", required=False)
@click.option("--all", "every", is_flag=True, help="All that are paused.")
@common
@pass_app
def resume(app: App, job: str | None, every: bool) -> None:
    """Let a paused job go on when its turn comes."""
    with app.client() as client:
        _each(app, job, every, client.jobs.list, client.jobs.resume)


@job.command()
@_job_argument
@common
@pass_app
def cancel(app: App, job: str) -> None:
    """Give a job up; all is as it was before it."""
    with app.client() as client:
        _show(app, client.jobs.cancel(job))


def _each(
    app: App,
    job: str | None,
    every: bool,
    find: Callable[[], list[Job]],
    act: Callable[[str], Job],
) -> None:
    """Do it to the one that is named, or to all."""
    if every is (job is not None):
        raise click.UsageError("name one job, or all of them with --all.")
    if job is not None:
        _show(app, act(job))
        return
    # One that ends meanwhile has no need of it.
    done = [act(one.id) for one in find() if one.state in _ACTIVE]
    if app.json:
        print_json({"jobs": done})
        return
    for one in done:
        click.echo(f"{one.id} {one.state}")


def _show(app: App, record: Job) -> None:
    (print_json if app.json else print_details)(record)
