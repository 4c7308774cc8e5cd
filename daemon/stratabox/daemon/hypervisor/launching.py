"""What all launchers share: domains are processes, found as such, and have come up when they greet.

A domain is the process that runs it, whoever started that; so each launcher lists, finds and
watches also those that another one has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stratabox.daemon.hypervisor import process, qmp
from stratabox.daemon.hypervisor.machine import DomainHandle
from stratabox.storage.model.errors import FailedError
from stratabox.storage.model.ids import SandboxId

START_SECONDS = 60.0
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
"""QEMU's, besides what its files take."""


class Processes:
    """The domains of one store that run on this host.

    :param store_id: names the store in the domains' names: letters, digits, dots, dashes.
    :param folder_of: the sandbox's own folder, where its sockets lie.
    """

    def __init__(self, store_id: str, folder_of: Callable[[SandboxId], Path]) -> None:
        self._store_id = store_id
        self._folder_of = folder_of

    async def list(self) -> Sequence[DomainHandle]:
        """All domains of this store that run on this host."""
        found = await asyncio.to_thread(process.find_all, self._store_id)
        return [
            DomainHandle(
                sandbox=each.sandbox,
                pid=each.pid,
                started=each.started,
                folder=self._folder_of(each.sandbox),
            )
            for each in found
        ]

    async def find(self, sandbox: SandboxId, folder: Path) -> DomainHandle | None:
        """The running domain of one sandbox, also one that an earlier daemon started."""
        for each in await asyncio.to_thread(process.find_all, self._store_id):
            if each.sandbox == sandbox:
                return DomainHandle(
                    sandbox=sandbox, pid=each.pid, started=each.started, folder=folder
                )
        return None

    def is_alive(self, handle: DomainHandle) -> bool:
        """Tell whether that very process still runs."""
        return process.start_time(handle.pid) == handle.started


@contextlib.contextmanager
def open_log(folder: Path) -> Iterator[int]:
    """A descriptor of the file in a sandbox's folder that its QEMU writes messages to."""
    descriptor = os.open(
        folder / process.LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def wait_greeting(handle: DomainHandle, log_start: int) -> None:
    """Wait until both monitors of a domain have greeted.

    :param log_start: bytes of its log that are older than it.
    :raise FailedError: QEMU_FAILED, when it ends before that, or takes `START_SECONDS`.
    """
    with process.opened(handle.pid, handle.started) as pidfd:
        if pidfd is None:
            raise early_end(handle, log_start)
        gone = asyncio.ensure_future(process.wait_gone(pidfd))
        greeting = asyncio.ensure_future(qmp.greet_all(handle.folder, START_SECONDS))
        try:
            await asyncio.wait((gone, greeting), return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise early_end(handle, log_start)
            await greeting
        except OSError as error:
            if await _ends_now(gone):
                raise early_end(handle, log_start) from error
            raise FailedError(
                f"QEMU does not come up ({error}). {process.log_tail(handle.folder, log_start)}",
                reason="QEMU_FAILED",
            ) from error
        finally:
            gone.cancel()
            greeting.cancel()
            await asyncio.wait((gone, greeting))


async def _ends_now(gone: asyncio.Future[None]) -> bool:
    """QEMU's sockets close a moment before its process is gone."""
    await asyncio.wait((gone,), timeout=1.0)
    return gone.done()


def early_end(handle: DomainHandle, log_start: int) -> FailedError:
    """The error for a QEMU that ended while it started, with its own words."""
    ended = process.describe(process.reap(handle.pid, handle.started))
    words = process.log_tail(handle.folder, log_start)
    return FailedError(
        f"QEMU {ended} while it started: {words or 'it said nothing'}", reason="QEMU_FAILED"
    )
