"""Tests of the plain launcher's, each as it is, with libvirt as the launcher: one of each kind.

The main job, with clones; memory, and a daemon that is killed; chains that are switched; volumes;
what a QEMU may reach. `make test-libvirt` runs all tests so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from integration.test_chains import (  # noqa: F401 (fixtures and tests, found by their names)
    guest,
    test_a_snapshot_is_compressed_and_its_guest_goes_over,
    written,
)
from integration.test_daemon_life import (  # noqa: F401
    living,
    test_guests_outlive_the_daemon,
    test_qemu_can_write_its_overlay_and_nothing_else,
    test_qemu_is_confined,
)
from integration.test_main_job import (  # noqa: F401
    test_create_work_snapshot_restore_clone_delete,
)
from integration.test_memory import (  # noqa: F401
    counting,
    test_a_daemon_that_was_killed_goes_on_with_it,
)
from integration.test_volumes import (  # noqa: F401
    booted,
    guests,
    test_snapshots_and_copies_of_volumes,
    volumes,
)
from stratabox.client import Client, Image
from support.daemon import LAUNCHER, DaemonProcess, daemon
from support.libvirt import private_libvirtd

pytestmark = [
    pytest.mark.launcher,
    pytest.mark.skipif(
        os.environ.get("STRATABOX_LAUNCHER") == "libvirt", reason="all tests are run with it"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def libvirt() -> Iterator[None]:
    """Every daemon of these tests uses a libvirtd of theirs."""
    with private_libvirtd() as libvirtd, pytest.MonkeyPatch.context() as patch:
        for name, value in libvirtd.environment.items():
            patch.setitem(LAUNCHER, name, value)
        yield


@pytest.fixture(scope="module")
def shared_daemon(
    libvirt: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    """Instead of the one that all other tests share."""
    with daemon(tmp_path_factory.mktemp("suite")) as process:
        with process.start() as client:
            client.images.build_tiny()
            assert client.host().launcher == "libvirt"
        yield process
        process.check_consistent()
        process.stop()


@pytest.fixture(scope="module")
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    with Client(shared_daemon.address) as client:
        yield client


@pytest.fixture(scope="module")
def tiny(client: Client) -> Image:
    return client.images.get("tiny")
