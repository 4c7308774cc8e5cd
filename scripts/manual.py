"""Writes the man pages: from the commands themselves, and from the rows of the configuration.

    python scripts/manual.py FOLDER    stratabox.1, strataboxd.8, stratabox.toml.5

Used by ``packaging/deb``. Nothing here knows a command or a key by name.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from stratabox.client.cli import cli
from stratabox.daemon.__main__ import make_parser
from stratabox.daemon.config.keys import KEYS

_SEE = {
    "stratabox": ".BR strataboxd (8),\n.BR stratabox.toml (5)",
    "strataboxd": ".BR stratabox (1),\n.BR stratabox.toml (5)",
    "stratabox.toml": ".BR strataboxd (8)",
}


def escape(text: str) -> str:
    """Plain text as troff takes it."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def page(name: str, section: int, what: str, body: list[str]) -> str:
    """One whole page."""
    head = f'.TH {name.upper()} {section} "" Stratabox "Stratabox"'
    named = [".SH NAME", f"{escape(name)} \\- {escape(what)}"]
    return "\n".join([head, *named, *body, ".SH SEE ALSO", _SEE[name], ""])


def stratabox() -> str:
    """stratabox(1): every command with its arguments and options."""
    body = [".SH SYNOPSIS", ".B stratabox", ".I COMMAND", "[\\fIARGUMENT\\fR]...", ".SH COMMANDS"]
    context = click.Context(cli, info_name="stratabox")
    for path, command, at in _commands(cli, context):
        arguments = " ".join(command.collect_usage_pieces(at))
        body += [f".SS {escape(path)} {escape(arguments)}", escape(_help(command.help))]
        for parameter in command.params:
            record = parameter.get_help_record(at)
            if record is not None:
                body += [".TP", f".B {escape(record[0])}", escape(record[1])]
    body += [".SH NOTES", ".nf", escape(_help(cli.epilog)), ".fi"]
    return page("stratabox", 1, "real virtual machines as local sandboxes", body)


def _commands(
    command: click.Command, context: click.Context
) -> Iterator[tuple[str, click.Command, click.Context]]:
    if not isinstance(command, click.Group):
        yield context.command_path, command, context
        return
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        if found is not None and not found.hidden:
            yield from _commands(found, click.Context(found, info_name=name, parent=context))


def _help(text: str | None) -> str:
    paragraphs = re.split(r"\n\s*\n", (text or "").replace("\b\n", "").strip())
    return "\n\n".join(paragraph.strip() for paragraph in paragraphs)


def strataboxd() -> str:
    """strataboxd(8): its commands; its settings are in the other page."""
    parser = make_parser()
    body = [
        ".SH SYNOPSIS", ".B strataboxd", "[\\fIOPTION\\fR]... [\\fICOMMAND\\fR]",
        ".SH DESCRIPTION", escape(parser.description or ""), ".SH COMMANDS",
    ]  # fmt: skip
    for path, text in _verbs(parser, ""):
        body += [".TP", f".B {escape(path)}", escape(text)]
    body += [
        ".SH OPTIONS", "Every key of", ".BR stratabox.toml (5)",
        "is an option, too, with dashes for underscores and dots: it beats the environment, which",
        "beats the file.", ".SH SIGNALS",
        ".TP", ".B SIGTERM, SIGINT", "End; guests run on, and the next daemon finds them.",
        ".TP", ".B SIGHUP", "Read the TLS certificates again.",
        ".TP", ".B SIGUSR1", "Log what is under way.",
    ]  # fmt: skip
    return page("strataboxd", 8, "the daemon of Stratabox", body)


def _verbs(parser: argparse.ArgumentParser, before: str) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, sub in action.choices.items():
                inner = list(_verbs(sub, f"{before}{name} "))
                yield from inner or [(f"{before}{name}", helps.get(name, ""))]


def configuration() -> str:
    """stratabox.toml(5): every key."""
    body = [
        ".SH DESCRIPTION",
        "The daemon's configuration, in TOML:", ".I /etc/stratabox/config.toml", "for root,",
        ".I ~/.config/stratabox/config.toml", "for others, or where",
        ".B STRATABOX_CONFIG", "says. A dot in a key leads into a table. Each key is also an",
        "environment variable, and an option of", ".BR strataboxd (8).", ".SH KEYS",
    ]  # fmt: skip
    for key in KEYS:
        default = key.default_doc.replace("`", "")
        if not callable(key.default):
            default = key.kind.toml(key.kind.parse(key.default))
        body += [
            ".TP", f".B {escape(key.name)}", escape(key.doc.replace("`", "")), ".br",
            escape(f"Allowed: {key.kind.allowed}. Default: {default}. Variable: {key.variable}."),
        ]  # fmt: skip
    return page("stratabox.toml", 5, "configuration of strataboxd", body)


def main() -> None:
    """Write all pages into the folder that the command line names."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("stratabox.1", stratabox()),
        ("strataboxd.8", strataboxd()),
        ("stratabox.toml.5", configuration()),
    ):
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
