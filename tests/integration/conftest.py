"""The ladder that tests climb: daemon → client → images → sandbox.

One daemon serves the whole session; tests that kill, fill or restart theirs take `own_daemon`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratabox.client import Client, Image, Sandbox
from support.daemon import LAUNCHER, DaemonProcess, daemon
from support.libvirt import private_libvirtd


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here boots real guests."""
    for item in items:
        if "tests/integration/" in item.path.as_posix():
            item.add_marker(pytest.mark.guest)


@pytest.fixture(scope="session", autouse=True)
def launcher() -> Iterator[None]:
    """What starts guests: libvirt, where STRATABOX_LAUNCHER says so (`make test-libvirt`)."""
    if os.environ.get("STRATABOX_LAUNCHER") != "libvirt":
        yield
        return
    with private_libvirtd() as libvirtd:
        LAUNCHER.update(libvirtd.environment)
        yield
        LAUNCHER.clear()


@pytest.fixture(scope="session")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all tests that do it no harm; at the end nothing is left of its guests."""
    with daemon(tmp_path_factory.mktemp("shared")) as process:
        client = process.start()
        client.images.build_tiny()
        yield process
        for sandbox in client.sandboxes.list(include_terminated=True):
            sandbox.delete()
        for snapshot in client.snapshots.list():
            client.snapshots.delete(snapshot.id)
        client.close()
        assert process.guests() == {}
        process.stop()


@pytest.fixture(scope="session")
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """A client of the shared daemon."""
    with Client(shared_daemon.address) as client:
        yield client


@pytest.fixture(scope="session")
def tiny(client: Client) -> Image:
    """The tiny image: boots in seconds."""
    return client.images.get("tiny")


@pytest.fixture(scope="session")
def debian(shared_daemon: DaemonProcess) -> Image:
    """A real Debian: systemd, Python, sshd."""
    with Client(shared_daemon.address) as client:
        return client.images.build_debian()


@pytest.fixture
def box(client: Client, tiny: Image) -> Iterator[Sandbox]:
    """A fresh tiny sandbox that is ready."""
    with client.sandboxes.create(image=tiny.id, memory=256) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def module_box(client: Client, tiny: Image) -> Iterator[Sandbox]:
    """A tiny sandbox that a module's tests share; they leave it as they found it."""
    with client.sandboxes.create(image=tiny.id, memory=256) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def debian_box(client: Client, debian: Image) -> Iterator[Sandbox]:
    """A Debian sandbox that a module's tests share; they leave it as they found it."""
    with client.sandboxes.create(image=debian.id, memory=512) as sandbox:
        yield sandbox


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A state folder for this test alone; its daemon is not started yet."""
    with daemon(tmp_path) as process:
        yield process
    # Only now: its guests are found by the catalog.
    shutil.rmtree(process.state, ignore_errors=True)


@pytest.fixture
def sh() -> Callable[[Sandbox, str], str]:
    """Run a shell line in a guest; it must succeed; its output without the last newline."""

    def run(sandbox: Sandbox, line: str) -> str:
        result = sandbox.execute(line)
        assert result.exit_code == 0, (line, result)
        return result.stdout.decode().rstrip("\n")

    return run
