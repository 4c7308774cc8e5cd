"""The plain launcher: QEMU as a child process that outlives the daemon.

Each QEMU runs in a session of its own, under a uid of its own where the daemon is root, with no
descriptor but those that it is given, its words appended to ``qemu.log`` in the sandbox's folder,
within the walls that `confinement` found this host to have. The daemon binds the sockets and opens
the files; QEMU opens nothing of the store by name.
"""

from __future__ import annotations

import asyncio
import grp
import os
import resource
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stratabox.daemon.hypervisor import command_line, confinement, launching, process, sockets
from stratabox.daemon.hypervisor.confinement import Confinement, Walls
from stratabox.daemon.hypervisor.housing import NOWHERE, Housing
from stratabox.daemon.hypervisor.launch_files import InheritedFiles
from stratabox.daemon.hypervisor.machine import DomainHandle, DomainSpec
from stratabox.daemon.hypervisor.qemu_host import QemuHost
from stratabox.storage.model.errors import FailedError
from stratabox.storage.model.ids import SandboxId


class QemuLauncher(launching.Processes):
    """Starts, stops, lists and finds QEMU processes of one store. Implements `Launcher`.

    :param store_id: names the store in the domains' names: letters, digits, dots, dashes.
    :param folder_of: the sandbox's own folder, where its sockets lie.
    :param confinement: what each QEMU is started in.
    :param housing: what each QEMU is put into.

    Making one forbids core dumps to this whole process and its children: guest memory holds
    secrets.
    """

    name = "qemu"

    def __init__(
        self,
        host: QemuHost,
        store_id: str,
        folder_of: Callable[[SandboxId], Path],
        confinement: Confinement,
        housing: Housing = NOWHERE,
    ) -> None:
        super().__init__(store_id, folder_of)
        self._host = host
        self._confinement = confinement
        self._housing = housing
        # Children inherit it. (Setting it on a child of another uid takes CAP_SYS_RESOURCE.)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    async def start(self, spec: DomainSpec) -> DomainHandle:
        """Start a domain with its vCPUs stopped; both its monitors have greeted on return.

        If this raises or is cancelled, no process and no socket is left.

        :raise FailedError: QEMU_FAILED, when QEMU does not come up; the message has its own words.
            CGROUP_FAILED, when it must be put into a control group and cannot be.
        :raise CorruptError: LAYER_MISSING, when a file of the store is not there.
        """
        log_start = process.log_size(spec.folder)
        try:
            handle = self._spawn(spec, log_start)
        except BaseException:
            sockets.remove(spec.folder)
            raise
        try:
            # While it is coming up by itself: what it takes until then is little, and not limited.
            await self._house(spec, handle)
            await launching.wait_greeting(handle, log_start)
        except BaseException:
            # Shielded: a second cancellation must not leave the process behind.
            await asyncio.shield(asyncio.ensure_future(self.stop(handle)))
            raise
        return handle

    async def stop(self, handle: DomainHandle) -> None:
        """End a domain at once, as by pulling its plug, and wait until it is gone. Idempotent.

        :raise FailedError: QEMU_FAILED, when the kernel does not let go of it.
        """
        if handle.console is not None:
            handle.console.close()
        await process.kill(handle.pid, handle.started)
        sockets.remove(handle.folder)

    async def _house(self, spec: DomainSpec, handle: DomainHandle) -> None:
        try:
            await self._housing.guest(spec, handle.pid)
        except FailedError:
            if self.is_alive(handle):
                raise  # else it has said itself why it ended

    def _spawn(self, spec: DomainSpec, log_start: int) -> DomainHandle:
        # A few ms, and not in a thread: so a cancellation can't come between fork and knowing it.
        name = process.guest_name(self._store_id, spec.sandbox)
        with InheritedFiles(spec) as files, launching.open_log(spec.folder) as log:
            command = [str(self._host.path), *command_line.build(spec, name, files)]
            environment = {**launching.ENVIRONMENT, **files.environment()}
            incoming = files.state()
            console = sockets.connect(spec.folder, sockets.CONSOLE)
            try:
                if self._confinement.walls is Walls.PLAIN:
                    pid = _spawn_plain(command, spec, files, environment, log)
                else:
                    pid = self._spawn_confined(command, spec, files, environment, log)
            except (OSError, subprocess.SubprocessError) as error:
                console.close()
                words = process.log_tail(spec.folder, log_start)
                raise FailedError(
                    f"QEMU cannot be started: {error}. {words}".rstrip(), reason="QEMU_FAILED"
                ) from error
        started = process.start_time(pid)
        # None: it ended already; 0 is no process's start time, and the wait below says why it did.
        return DomainHandle(
            sandbox=spec.sandbox,
            pid=pid,
            started=started or 0,
            folder=spec.folder,
            console=console,
            incoming=incoming,
        )

    def _spawn_confined(
        self,
        command: Sequence[str],
        spec: DomainSpec,
        files: InheritedFiles,
        environment: Mapping[str, str],
        log: int,
    ) -> int:
        report = os.pipe()
        try:
            confined = self._confinement.command(
                command,
                report=report[1],
                uid=spec.uid,
                groups=_groups(spec),
                reopened=files.reopened(),
                devices=_devices(spec),
            )
            return confinement.spawn(
                confined,
                report,
                output=log,
                environment=environment,
                descriptors=files.descriptors,
            )
        finally:
            os.close(report[0])
            os.close(report[1])


def _spawn_plain(
    command: Sequence[str],
    spec: DomainSpec,
    files: InheritedFiles,
    environment: Mapping[str, str],
    log: int,
) -> int:
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd="/",
        env=environment,
        pass_fds=files.descriptors,
        start_new_session=True,
        user=spec.uid,
        group=spec.uid,
        extra_groups=None if spec.uid is None else _groups(spec),
    )
    # From here on the pidfd tells of its end and `process.reap` reaps it. Popen must do
    # neither, nor warn that it was left running: that is what it is for.
    child.returncode = 0
    return child.pid


def _devices(spec: DomainSpec) -> list[str]:
    return ["/dev/kvm"] if spec.machine.accelerator == "kvm" else []


def _groups(spec: DomainSpec) -> list[int]:
    """Supplementary groups: none, but kvm's for the sake of /dev/kvm."""
    if spec.machine.accelerator != "kvm":
        return []
    try:
        return [grp.getgrnam("kvm").gr_gid]
    except KeyError:
        return []
