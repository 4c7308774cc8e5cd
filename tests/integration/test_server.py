"""The server around the API: health, reflection, and who may connect where."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from stratabox.client.addresses import grpc_target
from support.daemon import DaemonProcess


@pytest.fixture
def channel(shared_daemon: DaemonProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(grpc_target(shared_daemon.address)) as channel:
        yield channel


SERVICES = {
    "stratabox.v1.SandboxesService",
    "stratabox.v1.SnapshotsService",
    "stratabox.v1.ImagesService",
    "stratabox.v1.HostService",
}


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("", *SERVICES):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest
    [listed, described] = reflection.ServerReflectionInfo(
        iter(
            [
                request(list_services=""),
                request(file_containing_symbol="stratabox.v1.SandboxesService"),
            ]
        )
    )
    names = {service.name for service in listed.list_services_response.service}
    assert names >= SERVICES | {"grpc.health.v1.Health"}
    assert described.file_descriptor_response.file_descriptor_proto


def test_the_socket_is_for_its_owner_and_group(shared_daemon: DaemonProcess) -> None:
    mode = Path(shared_daemon.address.removeprefix("unix://")).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660
    assert stat.S_IMODE(shared_daemon.state.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "address",
    ["http://0.0.0.0:7777", "http://192.0.2.1:7777", "tcp://x", "7777"],
)
def test_other_addresses_are_refused(own_daemon: DaemonProcess, address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stratabox.daemon"],
        env=own_daemon.environment | {"STRATABOX_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert "address" in done.stderr
    assert "STRATABOX_ADDRESS" in done.stderr


def test_a_second_daemon_on_the_same_folder_is_refused(shared_daemon: DaemonProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stratabox.daemon"],
        env=shared_daemon.environment | {"STRATABOX_ADDRESS": f"{shared_daemon.address}.2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert f"pid {shared_daemon.pid}" in done.stderr
