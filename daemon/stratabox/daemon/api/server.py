"""The gRPC server: its services, its addresses, its limits; who may come in is ``api.door``'s."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
from collections.abc import Awaitable, Sequence
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from stratabox.daemon.access.certificates import Certificates
from stratabox.daemon.access.gate import Gate
from stratabox.daemon.api.console import ConsoleServicer
from stratabox.daemon.api.door import Door
from stratabox.daemon.api.events import EventsServicer
from stratabox.daemon.api.exec import ExecServicer
from stratabox.daemon.api.files import FilesServicer
from stratabox.daemon.api.host import HostServicer
from stratabox.daemon.api.images import ImagesServicer
from stratabox.daemon.api.jobs import JobsServicer
from stratabox.daemon.api.metrics import MetricsServicer
from stratabox.daemon.api.ports import PortsServicer
from stratabox.daemon.api.sandboxes import SandboxesServicer
from stratabox.daemon.api.snapshots import SnapshotsServicer
from stratabox.daemon.api.ssh import SshServicer
from stratabox.daemon.api.transfers import TransfersServicer
from stratabox.daemon.api.volumes import VolumesServicer
from stratabox.daemon.api.workspaces import WorkspacesServicer
from stratabox.daemon.config import Config
from stratabox.daemon.config.kinds import TcpAddress, UnixAddress
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.rpc.services import Services
from stratabox.daemon.service.activation import Relay
from stratabox.storage.model.errors import UnavailableError
from stratabox.v1 import (
    console_pb2,
    console_pb2_grpc,
    events_pb2,
    events_pb2_grpc,
    exec_pb2,
    exec_pb2_grpc,
    files_pb2,
    files_pb2_grpc,
    host_pb2,
    host_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    metrics_pb2,
    metrics_pb2_grpc,
    ports_pb2,
    ports_pb2_grpc,
    sandboxes_pb2,
    sandboxes_pb2_grpc,
    snapshots_pb2,
    snapshots_pb2_grpc,
    ssh_pb2,
    ssh_pb2_grpc,
    transfers_pb2,
    transfers_pb2_grpc,
    volumes_pb2,
    volumes_pb2_grpc,
    workspaces_pb2,
    workspaces_pb2_grpc,
)

log = logging.getLogger(__name__)

MESSAGE_BYTES = 64 << 20
"""Largest message: two streams of 16 MiB of a command's output, and room."""

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # Uploads come in pieces of at most 2 MiB; but Tenki's clients send whole files in one message.
    # What is too large by far still gets our error rather than gRPC's.
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 1024),
    # Two daemons must never share a TCP port by accident.
    ("grpc.so_reuseport", 0),
)
_SIGN_SECONDS = 20.0
"""How long a client may take for a sign of life, at most."""
_PING_SECONDS = 10.0
"""More often than this no client may ask for one of ours, as a rule."""
_FAREWELL_SECONDS = 10.0
"""For calls that were ended: to undo what they had begun, and to answer."""
_LAST_SECONDS = 1.0
"""For what is left when no call is under way: refusals."""


class Server:
    """The API, on all its addresses: the Unix socket on one side, TCP ports on the other.

    :param activated: the Unix socket, where systemd has opened it already; closed by `stop`.
    """

    def __init__(
        self,
        config: Config,
        *,
        gate: Gate,
        certificates: Certificates | None,
        sandboxes: SandboxesServicer,
        snapshots: SnapshotsServicer,
        images: ImagesServicer,
        host: HostServicer,
        jobs: JobsServicer,
        transfers: TransfersServicer,
        commands: ExecServicer,
        files: FilesServicer,
        volumes: VolumesServicer,
        ports: PortsServicer,
        ssh: SshServicer,
        events: EventsServicer,
        console: ConsoleServicer,
        metrics: MetricsServicer,
        workspaces: WorkspacesServicer,
        others: Sequence[Services] = (),
        activated: socket.socket | None = None,
    ) -> None:
        self._config = config
        self._certificates = certificates
        self._relay: Relay | None = None
        if activated is not None:
            assert isinstance(config.address, UnixAddress)
            self._relay = Relay(activated, _beside(config.address.path))
        self._health = health.aio.HealthServicer()
        # One for each side of the door, so that no call can be taken for one of the other side.
        self._gate = gate
        self._local_door, self._remote_door = Door(gate, local=True), Door(gate, local=False)
        self._local = (
            grpc.aio.server(options=_OPTIONS, interceptors=[self._local_door])
            if isinstance(config.address, UnixAddress)
            else None
        )
        self._remote = (
            grpc.aio.server(
                options=(*_OPTIONS, *_keepalive(config.keepalive)),
                interceptors=[self._remote_door],
            )
            if config.ports
            else None
        )
        self._servers = [each for each in (self._local, self._remote) if each is not None]
        for server in self._servers:
            sandboxes_pb2_grpc.add_SandboxesServiceServicer_to_server(sandboxes, server)
            snapshots_pb2_grpc.add_SnapshotsServiceServicer_to_server(snapshots, server)
            images_pb2_grpc.add_ImagesServiceServicer_to_server(images, server)
            host_pb2_grpc.add_HostServiceServicer_to_server(host, server)
            jobs_pb2_grpc.add_JobsServiceServicer_to_server(jobs, server)
            transfers_pb2_grpc.add_TransfersServiceServicer_to_server(transfers, server)
            volumes_pb2_grpc.add_VolumesServiceServicer_to_server(volumes, server)
            exec_pb2_grpc.add_ExecServiceServicer_to_server(commands, server)
            files_pb2_grpc.add_FilesServiceServicer_to_server(files, server)
            ports_pb2_grpc.add_PortsServiceServicer_to_server(ports, server)
            ssh_pb2_grpc.add_SshServiceServicer_to_server(ssh, server)
            events_pb2_grpc.add_EventsServiceServicer_to_server(events, server)
            console_pb2_grpc.add_ConsoleServiceServicer_to_server(console, server)
            metrics_pb2_grpc.add_MetricsServiceServicer_to_server(metrics, server)
            workspaces_pb2_grpc.add_WorkspacesServiceServicer_to_server(workspaces, server)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            for other in others:
                other.add_to(server)
        self._names = [
            module.DESCRIPTOR.services_by_name[name].full_name
            for module, name in (
                (sandboxes_pb2, "SandboxesService"),
                (snapshots_pb2, "SnapshotsService"),
                (images_pb2, "ImagesService"),
                (host_pb2, "HostService"),
                (jobs_pb2, "JobsService"),
                (transfers_pb2, "TransfersService"),
                (volumes_pb2, "VolumesService"),
                (ports_pb2, "PortsService"),
                (ssh_pb2, "SshService"),
                (events_pb2, "EventsService"),
                (exec_pb2, "ExecService"),
                (files_pb2, "FilesService"),
                (console_pb2, "ConsoleService"),
                (metrics_pb2, "MetricsService"),
                (workspaces_pb2, "WorkspacesService"),
            )
        ]
        self._names += [name for other in others for name in other.names]
        shown = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        for server in self._servers:
            reflection.enable_server_reflection(shown, server)

    async def start(self) -> None:
        """Open the addresses and serve.

        :raise UnavailableError: ADDRESS_IN_USE, when one cannot be opened.
        """
        address: object = self._config.address
        try:
            if self._local is not None and isinstance(address, UnixAddress):
                self._bind_unix(self._local, address)
            for address in self._config.ports:
                self._bind_port(address)
        except (RuntimeError, OSError) as error:
            raise UnavailableError(
                f"cannot listen on {address}: {error}", reason="ADDRESS_IN_USE"
            ) from error
        for server in self._servers:
            await server.start()
        if self._relay is not None:
            self._relay.start()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        local = (self._config.address,) if self._local is not None else ()
        log.info("listening on %s", ", ".join(map(str, (*local, *self._config.ports))))

    async def stop(self, grace: float) -> None:
        """Take no more calls; those under way get `grace` seconds, then they are ended.

        Who hears of it is told DAEMON_ENDING. By a socket that systemd holds nobody need hear:
        calls that come to it now are the next daemon's, and those by connections that are there are
        answered until their clients know. By other addresses calls are refused from now on.
        """
        await self._health.enter_graceful_shutdown()
        self._remote_door.close()
        if self._relay is None:
            self._local_door.close()
        else:
            self._relay.close()
        if not await _within(grace, self._finish()):
            log.warning("calls that were not over within %g s are broken off", grace)
            self._gate.end_all()
            await _within(_FAREWELL_SECONDS, self._finish())
        self._local_door.close()
        # gRPC drops what comes from here on, and what could not be undone in time.
        await asyncio.gather(*(server.stop(_LAST_SECONDS) for server in self._servers))
        if isinstance(self._config.address, UnixAddress):
            path = self._config.address.path
            if self._relay is not None:
                await self._relay.stop()
                path = _beside(path)
            await in_thread(path.unlink, missing_ok=True)

    async def _finish(self) -> None:
        """Wait until no call is under way, nor on its way here by the relay."""
        if self._relay is not None:
            await self._relay.finish()
        await self._gate.over()

    def _bind_port(self, address: TcpAddress) -> None:
        assert self._remote is not None
        if not address.tls:
            self._remote.add_insecure_port(address.target)
            return
        assert self._certificates is not None, "an https address is not served without"
        self._remote.add_secure_port(address.target, _credentials(self._certificates))

    def _bind_unix(self, server: grpc.aio.Server, address: UnixAddress) -> None:
        path, mode, group = address.path, self._config.socket_mode, self._config.socket_group
        if self._relay is not None:  # who may come in is said by the one that systemd has opened
            path, mode, group = _beside(path), 0o600, None
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # The state folder's lock is ours, so a socket that lies here is a dead daemon's.
        path.unlink(missing_ok=True)
        # The socket must not be open to others for even a moment between bind and chmod.
        before = os.umask(0o777 & ~mode)
        try:
            server.add_insecure_port(f"unix:{path}")
        finally:
            os.umask(before)
        path.chmod(mode)
        if group:
            shutil.chown(path, group=group)


async def _within(seconds: float, work: Awaitable[None]) -> bool:
    """Whether it came to its end in time; else it is cancelled."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        return False
    return True


def _beside(path: Path) -> Path:
    """Where gRPC listens for what is passed on from a socket that it has not opened."""
    return path.with_name(f".{path.name}")


def _keepalive(seconds: float) -> Sequence[tuple[str, int]]:
    """A client that is gone without a word, as behind a NAT that forgot it, is found out.

    On the Unix socket the kernel tells.
    """
    return (
        ("grpc.keepalive_time_ms", round(seconds * 1e3)),
        ("grpc.keepalive_timeout_ms", round(min(seconds, _SIGN_SECONDS) * 1e3)),
        # which gRPC counts by the longer of
        ("grpc.http2.ping_timeout_ms", round(min(seconds, _SIGN_SECONDS) * 1e3)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # no limit
        ("grpc.http2.min_ping_interval_without_data_ms", round(min(seconds, _PING_SECONDS) * 1e3)),
    )


def _credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Credentials of one port: each new connection gets what is in force then."""
    given = certificates.current

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(given.key, given.chain)], root_certificates=given.client_ca
        )

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        # In a thread of gRPC's, one handshake at a time.
        nonlocal given
        if given is certificates.current:
            return None
        given = certificates.current
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        fetch,  # type: ignore[arg-type]  # None is what it documents for "no change"
        require_client_authentication=given.client_ca is not None,
    )
