"""The command line, `stratabox`: one module for each noun.

`main` is the console script. The modules here import click and the SDK's records and errors;
gRPC and rich are imported when a command first needs them, so that `--help` is quick.
"""

from __future__ import annotations

import click

from stratabox.client.cli import (
    check,
    config,
    daemon,
    df,
    doctor,
    events,
    host,
    image,
    job,
    key,
    sandbox,
    snapshot,
    ssh,
    version,
    volume,
    workspace,
)
from stratabox.client.cli.app import Commands
from stratabox.client.cli.options import common

__all__ = ["cli", "main"]

_EPILOG = """\b
Exit codes:
  0    done
  1    it was tried and failed
  2    the command line or the request cannot be right
  3    there is no such sandbox, snapshot, image or volume
  4    its state does not allow that, something needs it, the name is ambiguous or taken, or the
       API key is not good for it
  5    no daemon answers
  124  the time was up (--timeout, --wait-timeout)
  130  interrupted
`sandbox exec` exits with the command's own code, or 128 + the signal that ended it.

\b
The daemon is looked for at --address, STRATABOX_ADDRESS, the configuration file's
address, or the state folder's default socket. TCP addresses take an API key, from
STRATABOX_API_KEY, and https ones may take STRATABOX_CA_FILE."""


@click.group(cls=Commands, epilog=_EPILOG, context_settings={"max_content_width": 100})
@common
def cli() -> None:
    """Real virtual machines as local sandboxes: freeze, branch and restore them at will."""


cli.add_command(sandbox.sandbox)
cli.add_command(snapshot.snapshot)
cli.add_command(image.image)
cli.add_command(job.job)
cli.add_command(key.key)
cli.add_command(df.df)
cli.add_command(check.check)
cli.add_command(config.config)
cli.add_command(doctor.doctor)
cli.add_command(host.host)
cli.add_command(daemon.daemon)
cli.add_command(events.events)
cli.add_command(ssh.ssh_config)
cli.add_command(version.version)
cli.add_command(volume.volume)
cli.add_command(workspace.workspace)


def main() -> None:
    """Run the command line of this process, and exit."""
    cli.main(prog_name="stratabox")
