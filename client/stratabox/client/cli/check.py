"""`stratabox check`: whether all that the daemon keeps and runs is as it must be."""

from __future__ import annotations

import click

from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import common
from stratabox.client.cli.output import print_json, print_table, printable, size


@click.command()
@click.option("--repair", is_flag=True, help="Do what is safe about what is found.")
@click.option("--deep", is_flag=True, help="Read sealed layers whole, too.")
@common
@pass_app
@click.pass_context
def check(ctx: click.Context, app: App, repair: bool, deep: bool) -> None:
    """Read all that the daemon keeps, and compare it with its catalog, its checksums, its guests.

    Guests go on meanwhile, and nothing is changed without --repair. That never removes anything:
    what no record explains is moved to the folder "quarantine" in the state folder. Exits with 1
    when something is not as it must be and was not repaired.
    """
    with app.client() as client, app.waiting("reading all that is kept"):
        checked = client.check(repair=repair, deep=deep)
    if app.json:
        print_json(checked)
    else:
        if checked.findings:
            print_table(
                ("REASON", "KIND", "SUBJECT", "REPAIRED"),
                (
                    (one.reason, one.kind, one.subject, "yes" if one.repaired else "no")
                    for one in checked.findings
                ),
            )
            for one in checked.findings:
                what = f"repaired: {one.repaired}" if one.repaired else one.cure
                click.echo(f"\n{printable(one.message)}\n  {printable(what)}")
            click.echo()
        if checked.quarantined_files:
            click.echo(
                f"in quarantine: {checked.quarantined_files} files,"
                f" {size(checked.quarantined_bytes)}, for you to look at and to remove"
            )
        repaired = len(checked.findings) - len(checked.left)
        click.echo(
            f"{checked.files} files, {size(checked.bytes)} read:"
            f" {len(checked.findings) or 'no'} findings"
            + (f", {repaired} repaired" if repaired else "")
        )
    ctx.exit(1 if checked.left else 0)
