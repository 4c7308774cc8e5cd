"""A host with systemd on which the package is installed, seen from outside."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from stratabox.client import Client, StrataboxError

PACKAGES = (
    "libpam-systemd",  # user managers
    # What the package depends on, and what Debian has of what it recommends.
    "e2fsprogs",
    "libslirp0",
    "qemu-system-x86",
    "qemu-utils",
    "seabios",
)
SYSTEM_API = "/run/stratabox/api.sock"
DAEMON = "strataboxd.service"
LINE_SECONDS = 600.0


class CommandError(AssertionError):
    """A command in the host has failed."""


class Host(ABC):
    """What all such hosts can be asked."""

    @abstractmethod
    def run(self, line: str, *, seconds: float = LINE_SECONDS) -> tuple[int, str]:
        """Run a line as root; its exit code, and all that it said.

        :raise CommandError: when it does not end in time.
        """

    @abstractmethod
    def put(self, source: Path) -> str:
        """Bring a file into /root; its path there."""

    @abstractmethod
    def api(self, socket: str = SYSTEM_API) -> AbstractContextManager[str]:
        """Lead to an API in there, as its root: the address by which that is reached here."""

    def sh(self, line: str, *, seconds: float = LINE_SECONDS) -> str:
        """Run a line as root and return what it said, without the last newline.

        :raise CommandError: when it fails.
        """
        code, text = self.run(line, seconds=seconds)
        if code != 0:
            raise CommandError(f"{line}: exit code {code}:\n{text}")
        return text

    @contextlib.contextmanager
    def client(self, socket: str = SYSTEM_API) -> Iterator[Client]:
        """A client of an API in there."""
        with self.api(socket) as address, Client(address) as client:
            yield client

    def show(self, unit: str, name: str) -> str:
        """Give one property of a unit."""
        return self.sh(f"systemctl show --value -p {name} {unit}")

    def daemon_pid(self) -> int:
        """The system's daemon; 0: none runs."""
        return int(self.show(DAEMON, "MainPID"))

    def settle(self) -> None:
        """Wait until its boot is over."""
        self.run("systemctl is-system-running --wait", seconds=900)

    def journal(self) -> str:
        """The last words of the daemon, and of systemd about it."""
        try:
            return self.run(
                "systemctl --no-pager --full status 'strataboxd*' 'stratabox*.scope';"
                " journalctl --no-pager -n 80 -o short-precise"
            )[1]
        except (CommandError, StrataboxError) as error:
            return f"none: {error}"
