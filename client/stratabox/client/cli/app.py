"""What every command shares: the global options, the client, and how a run ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from stratabox.client.cli import failures
from stratabox.client.errors import StrataboxError

if TYPE_CHECKING:
    from stratabox.client.sync import Client


class App:
    """The options that hold for the whole run, and what follows from them."""

    def __init__(self) -> None:
        self.address: str | None = None
        self.workspace: str | None = None
        self.json = False

    @contextmanager
    def client(self) -> Iterator[Client]:
        """Open the SDK's client for the length of a command."""
        from stratabox.client.sync import Client

        with Client(self.address, workspace=self.workspace) as client:
            yield client

    @property
    def animated(self) -> bool:
        """Whether somebody is looking who likes to see that something moves."""
        return not self.json and sys.stderr.isatty()

    @contextmanager
    def waiting(self, doing: str) -> Iterator[None]:
        """Show a spinner on a terminal while something takes its time."""
        if not self.animated:
            yield
            return
        from rich.console import Console

        from stratabox.client.cli.output import printable

        with Console(stderr=True).status(printable(doing), spinner="line"):
            yield

    def note(self, text: str) -> None:
        """Say something by the way, to people only."""
        if not self.json:
            click.echo(text, err=True)


pass_app = click.make_pass_decorator(App, ensure=True)


class Commands(click.Group):
    """The root of the command line: turns what goes wrong into a message and an exit code."""

    def main(  # type: ignore[override]  # it never returns: it is the whole program
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run, and exit with the code that the help text promises."""
        app = App()
        words = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        code: int = 0
        try:
            done = super().main(words, prog_name=prog_name, obj=app, **extra)
            code = done if isinstance(done, int) else 0
            sys.stdout.flush()
        except StrataboxError as error:
            code = failures.report(error, as_json=app.json)
        except click.UsageError as error:
            # --json may not have been seen yet when the words before it are wrong.
            code = failures.report_usage(error, as_json=app.json or _asks_for_json(error, words))
        except click.ClickException as error:
            code = failures.report_text(error.format_message(), as_json=app.json)
        except (click.Abort, KeyboardInterrupt):
            code = failures.INTERRUPTED
        except BrokenPipeError:  # the reader has seen enough, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = failures.FAILED
        except OSError as error:
            code = failures.report_text(str(error), as_json=app.json)
        sys.exit(code)


def _asks_for_json(error: click.UsageError, words: Sequence[str]) -> bool:
    its_own = error.ctx is not None and error.ctx.info_name in ("exec", "daemon")
    return "--json" in words and not its_own
