"""What sessions of Tenki's and sandboxes of Akira's reach: a server of packages, by its name."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from stratabox.client import Client
from support import world as w
from support.daemon import DaemonProcess, daemon
from support.data_plane import DataPlane
from support.tenki import Tenki
from support.world import World, world

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root")

LINE = "printf 'GET /whoami HTTP/1.0\\r\\n\\r\\n' | nc -w 60 pkg.test 80"
REACHED = {f"{w.PACKAGES}:80", "pkg.test"}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.fixture(scope="module")
def process(net: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """In a namespace of its own, so that its clients come by its sockets."""
    folder = tmp_path_factory.mktemp("reach")
    environment = {
        "STRATABOX_DEFAULT_IMAGE": "tiny",
        "STRATABOX_REST": f"unix://{folder}/rest.sock",
    }
    with daemon(folder, environment, wrapper=net.inside) as made:
        with made.start() as client:
            client.images.build_tiny()
        yield made
        with Client(made.address) as client:
            for each in client.sandboxes.list():
                each.delete()
        made.stop()


@pytest.fixture
def tenki(process: DaemonProcess) -> Iterator[Tenki]:
    made = Tenki(process, process.address, "")
    made.metadata = []  # the socket's mode is the key
    yield made
    made.close()


@pytest.mark.parametrize("outbound", [True, False])
def test_a_session_of_tenki_s(tenki: Tenki, net: World, outbound: bool) -> None:
    session = tenki.create(allow_outbound=outbound).session
    assert session.outbound_enabled is outbound
    net.reached()
    said = DataPlane(tenki, session.id).run("sh", "-c", LINE).stdout
    assert said.rstrip().endswith(w.PACKAGES.encode()) is outbound, said
    assert set(net.reached()) == (REACHED if outbound else set())
    tenki.terminate(session.id)


def test_a_sandbox_of_akira_s(process: DaemonProcess, net: World) -> None:
    def ask(verb: str, path: str, body: object = None) -> Any:
        command = ["curl", "-sS", "--fail-with-body", "-X", verb, f"http://host/v1/{path}"]
        command += ["--unix-socket", str(process.folder / "rest.sock")]
        if body is not None:
            command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done
        return json.loads(done.stdout) if done.stdout else None

    made = ask("POST", "sandboxes", {"image": "akiralabs/akira-default-sandbox"})
    net.reached()
    said = ask("POST", f"sandboxes/{made['id']}/execute", {"command": LINE})
    assert said["stdout"].rstrip().endswith(w.PACKAGES), said
    assert set(net.reached()) == REACHED
    ask("DELETE", f"sandboxes/{made['id']}")
