"""``strataboxd``: runs the daemon, examines the host, shows the configuration.

Runs and prints, nothing else: ``app`` is the daemon, ``config`` the configuration, ``doctor`` the
examination. Nothing here needs the [daemon] extra until the daemon is really started.

Exit codes: 0 all is well; 1 it failed (or the doctor found something that must be mended); 2 the
command line or the configuration is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata

from stratabox.daemon import doctor, extras
from stratabox.daemon.config import Config, add_flags, from_flags
from stratabox.daemon.config.keys import LauncherName
from stratabox.storage.model.errors import InvalidArgumentError, StrataboxError


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``strataboxd`` with these arguments and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        config = from_flags(vars(arguments), os.environ)
    except InvalidArgumentError as error:
        for line in error.message.splitlines():
            print(f"strataboxd: {line}", file=sys.stderr)
        return 2
    if arguments.command is None:
        return _run(config)
    show = _doctor if arguments.command == "doctor" else _show_config
    try:
        code = show(config, as_json=arguments.json)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
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
    for command in (examine, show):
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

    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
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
