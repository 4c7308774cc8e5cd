"""Images: built, imported, replaced, refused, deleted; and what they keep for later."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stratabox.client import (
    BootMethod,
    BuildProgress,
    Client,
    FailedError,
    Image,
    ImageAlreadyExistsError,
    ImageInUseError,
    ImageNotFoundError,
    ImageState,
    InvalidArgumentError,
    InvalidImageError,
    InvalidResourcesError,
    NoSpaceError,
    Sandbox,
)
from support.boot_disks import POWER_OFF, boot_disk
from support.daemon import DaemonProcess
from support.rig import wait_idle
from support.stored import wait_until

Shell = Callable[[Sandbox, str], str]
MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """What these tests do to the shared daemon leaves nothing of images behind."""
    if "client" not in request.fixturenames:
        yield
        return
    shared_daemon: DaemonProcess = request.getfixturevalue("shared_daemon")
    request.getfixturevalue("tiny")
    wait_idle(shared_daemon)  # a job of the tests before may be at layers of theirs
    before = shared_daemon.layers()
    yield
    wait_idle(shared_daemon)
    assert shared_daemon.layers() == before
    assert list((shared_daemon.state / "work").iterdir()) == []


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


# -- built ----------------------------------------------------------------------------------------


def test_the_tiny_image(client: Client, shared_daemon: DaemonProcess, tiny: Image) -> None:
    assert (tiny.name, tiny.state, tiny.boot) == ("tiny", ImageState.READY, BootMethod.KERNEL)
    assert (tiny.origin, tiny.size_bytes) == ("tiny", GIB)
    assert MIB < tiny.layer_bytes < 64 * MIB
    for digest in (tiny.kernel_sha256, tiny.initrd_sha256):
        assert digest is not None
        blob = shared_daemon.state / "blobs" / digest
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == digest
        assert blob.stat().st_mode & 0o777 == 0o444
    for reference in (tiny.id, "tiny", tiny.id[:8]):
        assert client.images.get(reference) == tiny


def test_building_again_under_another_name(client: Client, tiny: Image) -> None:
    steps: list[BuildProgress] = []
    again = client.images.build_tiny(name="tiny-2", progress=steps.append)
    assert steps
    assert all(step.step and (step.fraction is None or 0 <= step.fraction <= 1) for step in steps)
    assert (again.name, again.kernel_sha256) == ("tiny-2", tiny.kernel_sha256)
    assert [image.name for image in client.images.list()][:1] == ["tiny-2"]
    first = client.images.list_page(page_size=1)
    second = client.images.list_page(page_size=1, page_token=first.next_page_token)
    assert [*first.items, *second.items] == client.images.list()[:2]
    assert client.images.delete("tiny-2").freed_bytes > 0
    for gone in (client.images.get, client.images.delete):
        with pytest.raises(ImageNotFoundError):
            gone(again.id)
    assert client.images.get("tiny") == tiny


def test_a_taken_name_is_refused(client: Client, tmp_path: Path, tiny: Image) -> None:
    with pytest.raises(ImageAlreadyExistsError, match="tiny"):
        client.images.build_tiny()
    boot_disk(tmp_path / "disk.raw")
    with pytest.raises(ImageAlreadyExistsError):
        client.images.import_file(tmp_path / "disk.raw", name="tiny")
    assert client.images.get("tiny") == tiny


@pytest.mark.parametrize("name", ["a/b", "..", "-x", "a b", "x" * 129, "a\n"])
def test_names_that_cannot_be(client: Client, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="image name"):
        client.images.build_tiny(name=name)


def test_releases_and_packages_that_cannot_be(client: Client) -> None:
    for release in ("Bookworm; rm -rf /", "../x", "--mode=root"):
        with pytest.raises(InvalidArgumentError):
            client.images.build_debian(name="no", release=release)
    with pytest.raises(InvalidArgumentError):
        client.images.build_debian(name="no", include=["git", "--purge"])
    with pytest.raises(ImageNotFoundError):
        client.images.get("no")


def test_an_image_that_is_needed_stays_and_says_for_whom(client: Client) -> None:
    image = client.images.build_tiny(name="needed")
    with client.sandboxes.create(image="needed", memory=128, wait_for_ready=False) as sandbox:
        with pytest.raises(ImageInUseError, match=sandbox.id) as caught:
            client.images.delete("needed")
        assert caught.value.metadata["needed_by"] == sandbox.id
        snapshot = sandbox.snapshot(quick=True)
        sandbox.terminate()
        with pytest.raises(ImageInUseError) as caught:
            client.images.delete(image.id)
        assert caught.value.metadata["needed_by"] == snapshot.id
        # One takes the name; the old image stays for the snapshot that needs it.
        newer = client.images.build_tiny(name="needed", replace=True)
        assert client.images.get("needed").id == newer.id
        assert client.images.get(image.id).name == f"needed-{image.id[:8]}"
        client.snapshots.delete(snapshot.id)
        client.images.delete(image.id)
        # This one is needed by nobody, and goes when it is replaced.
        newest = client.images.build_tiny(name="needed", replace=True)
        assert [one.name for one in client.images.list()].count("needed") == 1
        with pytest.raises(ImageNotFoundError):
            client.images.get(newer.id)
        client.images.delete(newest.id)
        assert sandbox.refresh().image_name == "needed"


# -- imported -------------------------------------------------------------------------------------


def test_raw_and_qcow2_imports_boot_by_themselves(client: Client, tmp_path: Path) -> None:
    raw, qcow2 = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    boot_disk(raw, POWER_OFF)
    run("qemu-img", "convert", "-c", "-O", "qcow2", raw, qcow2)
    before = {path: path.read_bytes() for path in (raw, qcow2)}
    sent: list[tuple[int, int]] = []

    def take(path: Path) -> None:
        image = client.images.import_file(
            path, name=path.suffix[1:], progress=lambda done, total: sent.append((done, total))
        )
        assert (image.state, image.boot, image.origin) == ("ready", BootMethod.DISK, "import")
        assert (image.size_bytes, image.kernel_sha256) == (GIB, None)
        # Its boot sector powers the machine off at once: so it was run.
        with pytest.raises(FailedError, match="The guest powered itself off") as caught:
            client.sandboxes.create(image=image.id, memory=128)
        assert caught.value.reason == "GUEST_ENDED"
        client.images.delete(image.id)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(take, (raw, qcow2)))
    assert {path: path.read_bytes() for path in (raw, qcow2)} == before
    assert all((path.stat().st_size,) * 2 in sent for path in (raw, qcow2))


def test_a_sandbox_is_never_smaller_than_its_image(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "large.qcow2"
    run("qemu-img", "create", "-f", "qcow2", path, str(GIB + MIB))
    image = client.images.import_file(path, name="large")
    assert image.size_bytes == 2 * GIB
    with pytest.raises(InvalidResourcesError, match="smaller than image 'large' \\(2 GiB\\)"):
        client.sandboxes.create(image="large", memory=128, storage=1, wait_for_ready=False)
    with client.sandboxes.create(image="large", memory=128, wait_for_ready=False) as sandbox:
        assert sandbox.storage == 2
        snapshot = sandbox.snapshot(quick=True)
        with pytest.raises(InvalidResourcesError, match="smaller than snapshot"):
            client.snapshots.restore(snapshot.id, storage=1)
        with client.snapshots.restore(snapshot.id, storage=3, wait_for_ready=False) as larger:
            assert [disk.size_bytes for disk in larger.disks] == [3 * GIB]
        client.snapshots.delete(snapshot.id)
    client.images.delete(image.id)


def patched(path: Path, offset: int, content: bytes) -> None:
    run("qemu-img", "create", "-f", "qcow2", path, "64M")
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def with_backing_file(path: Path) -> None:
    base = path.with_name("base.qcow2")
    run("qemu-img", "create", "-f", "qcow2", base, "64M")
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", path)


def with_data_file(path: Path) -> None:
    data = path.with_name("data.raw")
    run("qemu-img", "create", "-f", "qcow2", "-o", f"data_file={data}", path, "64M")


def truncated(path: Path) -> None:
    raw = path.with_name("noise.raw")
    raw.write_bytes(os.urandom(4 * MIB))
    run("qemu-img", "convert", "-O", "qcow2", raw, path)
    os.truncate(path, path.stat().st_size // 2)


def of_another_kind(path: Path) -> None:
    run("qemu-img", "create", "-f", "vmdk", path, "64M")


@pytest.mark.parametrize(
    ("make", "format", "message"),
    [
        (with_backing_file, "qcow2", "it has a backing file"),
        (with_data_file, "qcow2", "external data file"),
        (truncated, "qcow2", "corrupt or truncated"),
        (of_another_kind, "qcow2", "does not start with qcow2's magic number"),
        (of_another_kind, "raw", "declared as raw, and is VMDK"),
        (lambda path: patched(path, 0, b"QFI\xfb"), "raw", "declared as raw, and is qcow2"),
        (lambda path: patched(path, 32, b"\0\0\0\2"), "qcow2", "it is encrypted"),
        (lambda path: patched(path, 24, b"\x0f" + b"\xff" * 7), "qcow2", "are allowed"),
        (lambda path: patched(path, 24, b"\0\0\0\x20" + b"\0" * 4), "qcow2", "are allowed"),
        (lambda path: patched(path, 36, b"\xff\xff\xff\xff"), "qcow2", "L1 table has"),
        (lambda path: patched(path, 4, b"\0\0\0\7"), "qcow2", "version 7 is not known"),
        (lambda path: patched(path, 72, b"\0\0\0\0\x80\0\0\0"), "qcow2", "not known"),
        (lambda path: path.write_bytes(b"QFI\xfb"), "qcow2", "ends within its header"),
        (lambda path: path.write_bytes(b""), "raw", "0 bytes"),
        (lambda path: path.write_bytes(b"x" * 700), "raw", "not whole sectors"),
    ],
)
def test_files_that_are_refused(
    client: Client, tmp_path: Path, make: Callable[[Path], object], format: str, message: str
) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises(InvalidImageError, match=message):
        client.images.import_file(path, name="evil", format=format)
    with pytest.raises(ImageNotFoundError):
        client.images.get("evil")


def test_a_suffix_is_no_statement(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "cloud.img"
    patched(path, 0, b"QFI\xfb")
    with pytest.raises(InvalidArgumentError, match="say which format"):
        client.images.import_file(path, name="cloud")
    with pytest.raises(InvalidArgumentError, match="does not tell"):
        client.images.import_file(path.rename(tmp_path / "cloud"), name="cloud")
    with pytest.raises(OSError, match="nowhere"):
        client.images.import_file(tmp_path / "nowhere.raw", name="cloud")


# -- daemons of their own -------------------------------------------------------------------------


def test_an_upload_that_is_too_large(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    with own_daemon.start(environment={"STRATABOX_MAX_IMAGE_BYTES": "1MiB"}) as client:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(3 * MIB))
        with pytest.raises(NoSpaceError, match="max_image_bytes") as caught:
            client.images.import_file(path, name="large")
        assert caught.value.reason == "IMAGE_TOO_LARGE"
        assert client.images.list() == []
        own_daemon.check_consistent()


def test_the_configured_image_serves_where_none_is_named(own_daemon: DaemonProcess) -> None:
    with own_daemon.start() as client:
        client.images.build_tiny()
        with pytest.raises(InvalidArgumentError, match="no image is named"):
            client.sandboxes.create()
    own_daemon.stop()
    with (
        own_daemon.start(environment={"STRATABOX_DEFAULT_IMAGE": "tiny"}) as client,
        client.sandboxes.create(memory=128, wait_for_ready=False) as sandbox,
    ):
        assert sandbox.image_name == "tiny"
    own_daemon.check_consistent()


def test_a_cancelled_build_leaves_nothing(own_daemon: DaemonProcess) -> None:
    class EnoughError(Exception):
        pass

    def tools() -> list[str]:
        return Path(f"/proc/{own_daemon.pid}/task/{own_daemon.pid}/children").read_text().split()

    def progress(step: BuildProgress) -> None:
        wait_until(lambda: tools() != [])
        raise EnoughError

    with own_daemon.start(environment={"STRATABOX_BUILD_CACHE": ""}) as client:
        with pytest.raises(EnoughError):
            client.images.build_tiny(progress=progress)
        wait_until(lambda: client.images.list() == [])
        assert tools() == []
        own_daemon.check_consistent()


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts something")


@as_root
def test_a_full_disk_leaves_nothing(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    own_daemon.state.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=16m", "none", own_daemon.state)
    try:
        with own_daemon.start() as client:
            with pytest.raises(NoSpaceError):
                client.images.build_tiny()
            assert client.images.list() == []
            own_daemon.check_consistent()
            path = tmp_path / "disk.raw"
            path.write_bytes(bytes(20 * MIB))
            with pytest.raises(NoSpaceError):
                client.images.import_file(path, name="large")
            path.write_bytes(os.urandom(9 * MIB))  # fits, but not twice
            with pytest.raises(NoSpaceError):
                client.images.import_file(path, name="large")
            assert client.images.list() == []
            own_daemon.check_consistent()
            boot_disk(path)
            client.images.import_file(path, name="small")
        own_daemon.stop()
    finally:
        own_daemon.wipe()
        run("umount", own_daemon.state)


@as_root
def test_guests_need_nothing_of_usr_share(own_daemon: DaemonProcess, sh: Shell) -> None:
    command = ["unshare", "--mount", sys.executable, "-m", "stratabox.daemon"]
    with own_daemon.log.open("ab") as log:
        daemon = subprocess.Popen(command, env=own_daemon.environment, stdout=log, stderr=log)
    try:
        with Client(own_daemon.address) as client:
            wait_until((own_daemon.folder / "api.sock").exists)
            client.images.build_tiny()
            run("nsenter", "-t", daemon.pid, "-m", "mount", "-t", "tmpfs", "none", "/usr/share")
            with client.sandboxes.create(image="tiny", memory=128) as sandbox:
                assert sh(sandbox, "echo runs") == "runs"
                pid = own_daemon.guests()[sandbox.id]
                assert "/usr/share" not in Path(f"/proc/{pid}/maps").read_text()
                sandbox.stop(force=True)
                assert sandbox.start(wait_for_ready=False).state == "running"
    finally:
        daemon.terminate()
        assert daemon.wait(60) == 0
