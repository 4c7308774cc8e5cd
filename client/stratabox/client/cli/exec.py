"""`stratabox sandbox exec`: one command in a guest, as if it ran here."""

from __future__ import annotations

import base64
import sys
from typing import Any

import click

from stratabox.client import errors
from stratabox.client.cli import streaming
from stratabox.client.cli.app import App, pass_app
from stratabox.client.cli.options import DURATION, PAIR, common
from stratabox.client.cli.output import jsonable, print_json
from stratabox.client.records import ExecuteResult

_NO_CHANNEL = ("NO_SSHD", "NO_CHANNEL", "CHANNEL_FAILED", "CHANNEL_UNAVAILABLE", "UNIMPLEMENTED")


class _ExecCommand(click.Command):
    """Parses `exec [OPTIONS] [SANDBOX] [OPTIONS] COMMAND…`.

    Options end at the first word of the command, whatever that word and the ones behind it look
    like. Without --session, the first word that is no option is the sandbox.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Turn a leading sandbox into --session, then parse as usual."""
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        rest = given.get("command")  # what click says for nothing differs between its versions
        if isinstance(rest, (list, tuple)) and rest and not isinstance(given.get("session"), str):
            before = args[: len(args) - len(rest)]
            if before[-1:] == ["--"]:  # options had ended before the sandbox
                args = [*before[:-1], f"--session={rest[0]}", "--", *rest[1:]]
            else:
                args = [*before, f"--session={rest[0]}", *rest[1:]]
        return super().parse_args(ctx, args)


@click.command(
    "exec",
    cls=_ExecCommand,
    context_settings={"allow_interspersed_args": False},
    options_metavar="[SANDBOX] [OPTIONS]",
)
@click.option("--session", metavar="SANDBOX", required=True, help="Instead of the argument.")
@click.option("-i", "--interactive", is_flag=True, help="Its standard input is this one's.")
@click.option("-t", "--tty", is_flag=True, help="It has a terminal; with -i this one.")
@click.option("-d", "--detach", is_flag=True, help="It goes on by itself; prints its id.")
@click.option("-u", "--user", metavar="USER", help="Who it runs as, by name or number; root.")
@click.option("--timeout", type=DURATION, metavar="DURATION", help="Then it is killed; as 30s.")
@click.option(
    "-e", "--env", type=PAIR, multiple=True, metavar="K=V", help="Environment; may be repeated."
)
@click.option("-w", "--cwd", metavar="FOLDER", help="Working directory in the guest.")
@common
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@pass_app
@click.pass_context
def execute(
    ctx: click.Context,
    app: App,
    session: str,
    interactive: bool,
    tty: bool,
    detach: bool,
    user: str | None,
    timeout: float | None,
    env: tuple[tuple[str, str], ...],
    cwd: str | None,
    command: tuple[str, ...],
) -> None:
    """Run one command in a guest and exit with its code.

    Everything from the first word of the command on is the command's own. What it prints comes out
    as it is, as it comes; with --json at its end. Exits with 128 + N when signal N ended it, with
    124 when its time was up. It ends when this does, unless it is detached; see `sandbox process`.
    For a shell: stratabox sandbox exec -it SANDBOX sh
    """
    given: dict[str, Any] = {"cwd": cwd, "env": dict(env), "timeout": timeout}
    if detach and (interactive or tty):
        raise click.UsageError("a detached process has neither input nor a terminal: -i, -t or -d")
    if app.json and (interactive or tty):
        raise click.UsageError("--json is for commands without -i and -t")
    with app.client() as client:
        if detach:
            name = client.processes.start(session, command, user=user, **given)
            if app.json:
                print_json({"process": name})
            else:
                click.echo(name)
            return
        try:
            if not app.json or user:
                ctx.exit(
                    streaming.run(
                        app, client, session, command, interactive=interactive, tty=tty, user=user,
                        **given,
                    )
                )  # fmt: skip
        except errors.StrataboxError as error:
            if interactive or tty or user or error.reason not in _NO_CHANNEL:
                raise
        # Without sshd in the guest, by its agent: all of the output at the end.
        result = client.sandboxes.execute(session, command, **given)
    if app.json:
        print_json(_as_json(result))
    else:
        _print_output(result)
        for name, cut in (("stdout", result.stdout_truncated), ("stderr", result.stderr_truncated)):
            if cut:
                app.note(f"warning: {name} was cut: there was more than is kept")
        streaming.note_end(app, result)
    ctx.exit(streaming.exit_code(result))


def _print_output(result: ExecuteResult) -> None:
    sys.stdout.buffer.write(result.stdout)
    sys.stdout.buffer.flush()
    sys.stderr.buffer.write(result.stderr)
    sys.stderr.buffer.flush()


def _as_json(result: ExecuteResult) -> dict[str, Any]:
    body: dict[str, Any] = jsonable(
        {"exit_code": result.exit_code, "signal": result.signal, "timed_out": result.timed_out}
    )
    for name, data in (("stdout", result.stdout), ("stderr", result.stderr)):
        body[name] = data.decode(errors="replace")
        is_text = body[name].encode() == data
        body[f"{name}_base64"] = None if is_text else base64.b64encode(data).decode()
    body["stdout_truncated"] = result.stdout_truncated
    body["stderr_truncated"] = result.stderr_truncated
    body["out_of_memory"] = result.out_of_memory
    body["disk_full"] = result.disk_full
    body["duration_seconds"] = result.duration.total_seconds()
    return body
