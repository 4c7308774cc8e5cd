"""Tells systemd that the daemon is ready, alive, or ending (sd_notify(3), sd_watchdog_enabled(3)).

Signs of life come from the event loop itself: a loop that stands still for `WatchdogSec=` is what
the watchdog is there for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import MutableMapping

log = logging.getLogger(__name__)


class Notifier:
    """Says things to whoever started the daemon; says nothing where nobody wants to hear.

    Takes the variables out of the environment, so that no child of the daemon's speaks for it.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._address = environ.pop("NOTIFY_SOCKET", "")
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = pid in ("", str(os.getpid()))
        self._every = int(usec) / 2e6 if ours and usec.isdecimal() else 0.0

    def tell(self, *lines: str) -> None:
        """Say something, as "READY=1"."""
        if not self._address:
            return
        name = f"\0{self._address[1:]}" if self._address[0] == "@" else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            try:
                sender.sendto("\n".join(lines).encode(), name)
            except OSError as error:
                log.warning("systemd does not hear %s: %s", lines[0], error)

    async def live(self) -> None:
        """Give signs of life until cancelled; return at once where none are wanted."""
        while self._every:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self._every)
