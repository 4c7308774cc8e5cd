"""The plain launcher: QEMU as a child process that outlives the daemon.

Each QEMU runs in a session of its own, under a uid of its own where the daemon is root, with no
descriptor but those that it is given, its words appended to ``qemu.log`` in the sandbox's folder.
The daemon binds the sockets and opens the files; QEMU opens nothing of the store by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import resource
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stratabox.daemon.hypervisor import command_line, process, qmp, sockets
from stratabox.daemon.hypervisor.launch_files import InheritedFiles
from stratabox.daemon.hypervisor.machine import DomainHandle, DomainSpec
from stratabox.daemon.hypervisor.qemu_host import QemuHost
from stratabox.storage.model.errors import FailedError
from stratabox.storage.model.ids import SandboxId

START_SECONDS = 60.0

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class QemuLauncher:
    """Starts, stops, lists and finds QEMU processes of one store. Implements `Launcher`.

    :param store_id: names the store in the domains' names: letters, digits, dots, dashes.
    :param folder_of: the sandbox's own folder, where its sockets lie.

    Making one forbids core dumps to this whole process and its children: guest memory holds
    secrets.
    """

    name = "qemu"

    def __init__(
        self, host: QemuHost, store_id: str, folder_of: Callable[[SandboxId], Path]
    ) -> None:
        self._host = host
        self._store_id = store_id
        self._folder_of = folder_of
        # Children inherit it. (Setting it on a child of another uid takes CAP_SYS_RESOURCE.)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    async def start(self, spec: DomainSpec) -> DomainHandle:
        """Start a domain with its vCPUs stopped; both its monitors have greeted on return.

        If this raises or is cancelled, no process and no socket is left.

        :raise FailedError: QEMU_FAILED, when QEMU does not come up; the message has its own words.
        :raise CorruptError: LAYER_MISSING, when a file of the store is not there.
        """
        log_start = process.log_size(spec.folder)
        try:
            handle = self._spawn(spec)
        except BaseException:
            sockets.remove(spec.folder)
            raise
        try:
            await self._wait_greeting(handle, log_start)
        except BaseException:
            # Shielded: a second cancellation must not leave the process behind.
            await asyncio.shield(asyncio.ensure_future(self.stop(handle)))
            raise
        return handle

    async def stop(self, handle: DomainHandle) -> None:
        """End a domain at once, as by pulling its plug, and wait until it is gone. Idempotent.

        :raise FailedError: QEMU_FAILED, when the kernel does not let go of it.
        """
        await process.kill(handle.pid, handle.started)
        sockets.remove(handle.folder)

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

    def _spawn(self, spec: DomainSpec) -> DomainHandle:
        # A few ms, and not in a thread: so a cancellation can't come between fork and knowing it.
        name = process.guest_name(self._store_id, spec.sandbox)
        with InheritedFiles(spec) as files, _open_log(spec.folder) as log:
            arguments = command_line.build(spec, name, files)
            environment = files.environment()
            try:
                child = subprocess.Popen(
                    [str(self._host.path), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env={**_ENVIRONMENT, **environment},
                    pass_fds=files.descriptors,
                    start_new_session=True,
                    user=spec.uid,
                    group=spec.uid,
                    extra_groups=None if spec.uid is None else _groups(spec),
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise FailedError(
                    f"QEMU cannot be started: {error}.", reason="QEMU_FAILED"
                ) from error
        started = process.start_time(child.pid)
        # From here on the pidfd tells of its end and `process.reap` reaps it. Popen must do
        # neither, nor warn that it was left running: that is what it is for.
        child.returncode = 0
        # None: it ended already; 0 is no process's start time, and the wait below says why it did.
        return DomainHandle(
            sandbox=spec.sandbox, pid=child.pid, started=started or 0, folder=spec.folder
        )

    async def _wait_greeting(self, handle: DomainHandle, log_start: int) -> None:
        with process.opened(handle.pid, handle.started) as pidfd:
            if pidfd is None:
                raise _early_end(handle, log_start)
            gone = asyncio.ensure_future(process.wait_gone(pidfd))
            greeting = asyncio.ensure_future(qmp.greet_all(handle.folder, START_SECONDS))
            try:
                await asyncio.wait((gone, greeting), return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise _early_end(handle, log_start)
                await greeting
            except OSError as error:
                if await _ends_now(gone):
                    raise _early_end(handle, log_start) from error
                raise FailedError(
                    f"QEMU does not come up ({error}). "
                    f"{process.log_tail(handle.folder, log_start)}",
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


def _early_end(handle: DomainHandle, log_start: int) -> FailedError:
    ended = process.describe(process.reap(handle.pid, handle.started))
    words = process.log_tail(handle.folder, log_start)
    return FailedError(
        f"QEMU {ended} while it started: {words or 'it said nothing'}", reason="QEMU_FAILED"
    )


@contextlib.contextmanager
def _open_log(folder: Path) -> Iterator[int]:
    descriptor = os.open(
        folder / process.LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _groups(spec: DomainSpec) -> list[int]:
    """Supplementary groups: none, but kvm's for the sake of /dev/kvm."""
    if spec.machine.accelerator != "kvm":
        return []
    try:
        return [grp.getgrnam("kvm").gr_gid]
    except KeyError:
        return []
