"""``strataboxd``: runs the daemon, examines the host, shows the configuration, mends the catalog.

Runs and prints, nothing else: ``app`` is the daemon, ``config`` the configuration, ``doctor`` the
examination, ``catalog_tool`` the catalog's backups, ``key_tool`` the API keys. Nothing here needs
the [daemon] extra until the daemon is really started.

Exit codes: 0 all is well; 1 it failed (or the doctor found something that must be mended); 2 the
command line or the configuration is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata

from stratabox.daemon import catalog_tool, doctor, extras, key_tool, logs
from stratabox.daemon.config import Config, add_flags, from_flags
from stratabox.daemon.config.keys import LauncherName
from stratabox.storage.model.errors import InvalidArgumentError, StrataboxError


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``strataboxd`` with these arguments and return its exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        config = from_flags(vars(arguments), os.environ)
    except InvalidArgumentError as error:
        for line in error.message.splitlines():
            print(f"strataboxd: {line}", file=sys.stderr)
        return 2
    if arguments.command is None:
        return _run(config)
    try:
        code = _show(config, arguments)
        sys.stdout.flush()
    except StrataboxError as error:
        print(f"strataboxd: {error.message}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _show(config: Config, arguments: argparse.Namespace) -> int:
    as_json: bool = arguments.json
    match arguments.command, getattr(arguments, "verb", None):
        case "doctor", _:
            return _doctor(config, as_json=as_json)
        case "catalog", "list-backups":
            return catalog_tool.list_backups(config, as_json=as_json)
        case "catalog", _:
            return catalog_tool.restore(config, arguments.backup, as_json=as_json)
        case "key", _:
            return key_tool.run(config, arguments, as_json=as_json)
    return _show_config(config, as_json=as_json)


def make_parser() -> argparse.ArgumentParser:
    """All that the command line takes."""
    parser = argparse.ArgumentParser(
        prog="strataboxd",
        allow_abbrev=False,
        description="Stratabox's daemon: real virtual machines as sandboxes. Without a command it "
        "runs in the foreground until SIGTERM; guests outlive it.",
    )
    parser.add_argument(
        "--version", action="version", version=f"strataboxd {metadata.version('stratabox')}"
    )
    add_flags(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    examine = commands.add_parser(
        "doctor", allow_abbrev=False, help="say what this host can do, and how to mend the rest"
    )
    config = commands.add_parser("config", allow_abbrev=False, help="the configuration in force")
    show = config.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "show", allow_abbrev=False, help="print every key, its value and where that came from"
    )
    catalog = commands.add_parser(
        "catalog", allow_abbrev=False, help="backups of the catalog, for when it is damaged"
    ).add_subparsers(dest="verb", metavar="COMMAND", required=True)
    listing = catalog.add_parser(
        "list-backups", allow_abbrev=False, help="print all backups, and whether each is good"
    )
    restore = catalog.add_parser(
        "restore",
        allow_abbrev=False,
        help="put a backup in the catalog's place, with no daemon running; the catalog that is "
        "there now is kept aside",
    )
    restore.add_argument(
        "backup", nargs="?", metavar="BACKUP", help="its name; without: the newest that is good"
    )
    keys = key_tool.add_commands(commands)
    for command in (examine, show, listing, restore, *keys):
        command.add_argument("--json", action="store_true", help="print JSON for programs")
        add_flags(command)
    return parser


def _run(config: Config) -> int:
    for extra, install, wanted in (
        (extras.DAEMON, extras.INSTALL_DAEMON, True),
        (extras.LIBVIRT, extras.INSTALL_LIBVIRT, config.launcher is LauncherName.LIBVIRT),
    ):
        missing = extras.missing_modules(extra) if wanted else []
        if missing:
            print(
                f"strataboxd: not installed: {', '.join(missing)}. The daemon needs an extra; "
                f"install it with: {install}",
                file=sys.stderr,
            )
            return 1
    # gRPC's handlers around fork crash children that are forked while it works in another thread;
    # the daemon's children only exec. It reads this when it is imported.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    from stratabox.daemon.app import serve

    logs.begin(config)
    try:
        asyncio.run(serve(config))
    except StrataboxError as error:
        print(f"strataboxd: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _doctor(config: Config, *, as_json: bool) -> int:
    report = doctor.examine(config)
    print(json.dumps(report.as_dict(), indent=2) if as_json else report.as_text())
    return 0 if report.ok else 1


def _show_config(config: Config, *, as_json: bool) -> int:
    settings = config.settings()
    if as_json:
        print(json.dumps({"settings": [asdict(setting) for setting in settings]}, indent=2))
        return 0
    left = max(len(setting.key) for setting in settings)
    middle = max(len(setting.value) for setting in settings)
    for setting in settings:
        print(f"{setting.key:<{left}} = {setting.value:<{middle}}  # {setting.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
