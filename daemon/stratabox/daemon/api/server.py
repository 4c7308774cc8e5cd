"""The gRPC server: its services, its address, its limits."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from stratabox.daemon.api.host import HostServicer
from stratabox.daemon.api.images import ImagesServicer
from stratabox.daemon.api.sandboxes import SandboxesServicer
from stratabox.daemon.api.snapshots import SnapshotsServicer
from stratabox.daemon.config import Config
from stratabox.daemon.config.kinds import TcpAddress, UnixAddress
from stratabox.daemon.lifecycle.threads import in_thread
from stratabox.storage.model.errors import UnavailableError
from stratabox.v1 import (
    host_pb2,
    host_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    sandboxes_pb2,
    sandboxes_pb2_grpc,
    snapshots_pb2,
    snapshots_pb2_grpc,
)

log = logging.getLogger(__name__)

MESSAGE_BYTES = 64 << 20
"""Largest message: two streams of 16 MiB of a command's output, and room."""

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # Uploads come in pieces of at most 2 MiB, and nothing that makes sense is larger. What is too
    # large by far still gets our error rather than gRPC's.
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_concurrent_streams", 1024),
    # Two daemons must never share a TCP port by accident.
    ("grpc.so_reuseport", 0),
)


class Server:
    """The API, on one address."""

    def __init__(
        self,
        config: Config,
        *,
        sandboxes: SandboxesServicer,
        snapshots: SnapshotsServicer,
        images: ImagesServicer,
        host: HostServicer,
    ) -> None:
        self._config = config
        self._server = grpc.aio.server(options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        sandboxes_pb2_grpc.add_SandboxesServiceServicer_to_server(sandboxes, self._server)
        snapshots_pb2_grpc.add_SnapshotsServiceServicer_to_server(snapshots, self._server)
        images_pb2_grpc.add_ImagesServiceServicer_to_server(images, self._server)
        host_pb2_grpc.add_HostServiceServicer_to_server(host, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = [
            module.DESCRIPTOR.services_by_name[name].full_name
            for module, name in (
                (sandboxes_pb2, "SandboxesService"),
                (snapshots_pb2, "SnapshotsService"),
                (images_pb2, "ImagesService"),
                (host_pb2, "HostService"),
            )
        ]
        reflection.enable_server_reflection(
            [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )

    async def start(self) -> None:
        """Open the address and serve.

        :raise UnavailableError: ADDRESS_IN_USE, when it cannot be opened.
        """
        address = self._config.address
        try:
            match address:
                case UnixAddress():
                    self._bind_unix(address)
                case TcpAddress():
                    self._server.add_insecure_port(address.target)
        except (RuntimeError, OSError) as error:
            raise UnavailableError(
                f"cannot listen on {address}: {error}", reason="ADDRESS_IN_USE"
            ) from error
        await self._server.start()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("listening on %s", address)

    async def stop(self, grace: float) -> None:
        """Take no more calls; those under way get `grace` seconds, then they are cancelled."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)
        if isinstance(self._config.address, UnixAddress):
            await in_thread(self._config.address.path.unlink, missing_ok=True)

    def _bind_unix(self, address: UnixAddress) -> None:
        path = address.path
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # The state folder's lock is ours, so a socket that lies here is a dead daemon's.
        path.unlink(missing_ok=True)
        # The socket must not be open to others for even a moment between bind and chmod.
        before = os.umask(0o777 & ~self._config.socket_mode)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        finally:
            os.umask(before)
        path.chmod(self._config.socket_mode)
        if self._config.socket_group:
            shutil.chown(path, group=self._config.socket_group)
