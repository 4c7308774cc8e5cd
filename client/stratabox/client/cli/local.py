"""Runs the daemon's own program, which this distribution carries: doctor, config show, daemon.

The client never imports the daemon; what it can do locally is asked of a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

import click

from stratabox.client.cli.app import App

_EXTRA = ("qemu.qmp", "grpc_health", "grpc_reflection")


def lacks_daemon() -> bool:
    """Tell whether the [daemon] extra is missing from this installation."""
    return not all(map(_is_installed, ("stratabox.daemon", *_EXTRA)))


def warn_without_daemon() -> None:
    """Say which extra to install, when it is missing."""
    if lacks_daemon():
        click.echo("hint: for a daemon here, first: pip install 'stratabox[daemon]'", err=True)


def run_local(app: App, words: Sequence[str]) -> int:
    """Run the daemon's program with these words, and --json where asked for; its exit code."""
    command = [*_command(app), *words, *(["--json"] if app.json else [])]
    sys.stdout.flush()
    code = subprocess.run(command, check=False).returncode
    return 128 - code if code < 0 else code


def become_local(app: App, words: Sequence[str]) -> NoReturn:
    """Become the daemon's program; never returns."""
    command = [*_command(app), *words]
    sys.stdout.flush()
    os.execv(command[0], command)


def _command(app: App) -> list[str]:
    # -P: nothing in the folder that the user happens to stand in is imported.
    command = [sys.executable, "-P", "-m", "stratabox.daemon"]
    return [*command, "--address", app.address] if app.address else command


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package above it
        return False
