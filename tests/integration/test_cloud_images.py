"""Cloud images: a seed sets up, at the first boot, what cloud-init can; and what becomes of copies.

The image is made here of Debian's packages and boots by GRUB from a partition: `support.cloud`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratabox.client import (
    Client,
    CloudInitFailedError,
    DeniedError,
    Image,
    InvalidArgumentError,
    InvalidUserDataError,
    Sandbox,
    VolumeInUseError,
)
from support.boot_disks import boot_disk
from support.cloud import SIZE, USER, cloud_disk
from support.daemon import DaemonProcess, daemon

GIB = 1 << 30
USER_DATA = """\
#cloud-config
write_files:
  - path: /etc/written
    content: by cloud-init
runcmd:
  - [sh, -c, "echo once >>/var/lib/ran; echo >&2 no such luck; exit 3"]
bootcmd:
  - [sh, -c, "echo again >>/var/lib/booted; exit 4"]
"""
Run = Callable[[Sandbox, str], str]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon whose store nobody else looks into."""
    with daemon(tmp_path_factory.mktemp("cloud")) as process:
        yield process


@pytest.fixture(scope="module")
def cloud(process: DaemonProcess) -> Iterator[Client]:
    """A client of it."""
    with process.start() as client:
        yield client


@pytest.fixture(scope="module")
def image(cloud: Client) -> Image:
    """The image, taken as one that runs cloud-init."""
    return cloud.images.import_file(cloud_disk(), name="cloud", cloud_init=True)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Somebody's public key."""
    path = tmp_path_factory.mktemp("key") / "id"
    subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", path], check=True)
    return path.with_suffix(".pub").read_text().strip()


@pytest.fixture(scope="module")
def box(cloud: Client, image: Image, key: str) -> Iterator[Sandbox]:
    """A sandbox that user data sets up, but for two commands, on a larger disk."""
    with cloud.sandboxes.create(
        image=image.id,
        name="Cloudy Box",
        cpus=2,
        memory=384,
        storage=SIZE // GIB + 2,
        user_data=USER_DATA,
        ssh_keys=[key],
        wait_for_ready=False,
    ) as sandbox:
        yield sandbox


def test_user_data_that_would_do_nothing_is_refused(
    cloud: Client, image: Image, process: DaemonProcess, tmp_path: Path
) -> None:
    for user_data, why in (
        ("hello", "first line"),
        ("#cloud-config\nruncmd: [1\n", "line 2"),
        ("#cloud-config\n- runcmd\n", "mapping"),
        (b"#cloud-config\n\xff", "UTF-8"),
        ("#cloud-config\n" + "[" * 1000, "deep"),
        ("#!" + "x" * (512 << 10), "bytes"),
    ):
        with pytest.raises(InvalidUserDataError, match=why):
            cloud.sandboxes.create(image=image.id, user_data=user_data)
    for key in ("ssh-ed25519", "-----BEGIN OPENSSH PRIVATE KEY-----", "a\nb"):
        with pytest.raises(InvalidArgumentError, match="public SSH key"):
            cloud.sandboxes.create(image=image.id, ssh_keys=[key])
    boot_disk(tmp_path / "plain.raw")
    plain = cloud.images.import_file(tmp_path / "plain.raw", name="plain")
    assert (image.cloud_init, plain.cloud_init) == (True, False)
    with pytest.raises(DeniedError, match="--cloud-init") as refused:
        cloud.sandboxes.create(image="plain", user_data=USER_DATA)
    assert refused.value.reason == "NO_CLOUD_INIT"
    # Refused so late that its seed was made: that is removed, too.
    blobs = {path.name for path in (process.state / "blobs").iterdir()}
    volume = cloud.volumes.create(size_bytes=64 << 20)
    mount = f"{volume.id}:/data"
    other = cloud.sandboxes.create(image="plain", volumes=[mount], wait_for_ready=False)
    with pytest.raises(VolumeInUseError):
        cloud.sandboxes.create(image=image.id, volumes=[mount])
    other.delete()
    assert {path.name for path in (process.state / "blobs").iterdir()} == blobs
    assert cloud.sandboxes.list(include_terminated=True) == []


def test_what_goes_wrong_is_told(box: Sandbox, sh: Run) -> None:
    reason = box.wait_ready(timeout=600).state_reason or ""
    assert reason.startswith("cloud-init says")
    assert "bootcmd" in reason
    assert "scripts" in reason
    assert "no such luck" in sh(box, "cat /var/log/cloud-init-output.log")


def test_the_first_boot_does_all_that_the_seed_says(
    box: Sandbox, cloud: Client, key: str, sh: Run
) -> None:
    assert sh(box, "cat /etc/written") == "by cloud-init"
    assert cloud.files.stat(box.id, "/etc/written").size == len("by cloud-init"), "by its own sshd"
    assert sh(box, "cat /var/lib/ran") == "once"
    assert sh(box, "hostname") == "cloudy-box"
    assert sh(box, f"cat /home/{USER}/.ssh/authorized_keys") == key
    assert sh(box, "cat /var/lib/cloud/data/instance-id") == box.id
    assert int(sh(box, "df -B1 --output=size / | tail -n 1")) > SIZE + 1.8 * GIB
    # Its card has no link, as it has no network; nobody waited for that.
    assert sh(box, "systemctl is-active systemd-networkd-wait-online || true") == "inactive"
    # Ours: the hooks before a freeze are run.
    agent = sh(box, "tr '\\0' ' ' </proc/$(pidof qemu-ga)/cmdline")
    assert "-F/usr/libexec/stratabox/fsfreeze-hook" in agent
    assert box.snapshot(name="frozen").frozen_filesystems >= 1


def test_a_copy_is_somebody_new_and_nothing_is_done_again(box: Sandbox, sh: Run) -> None:
    result = box.clone(name="copy", level="memory", snapshot_name="running")
    with result.sandboxes[0] as copy:
        assert sh(copy, "hostname") == "copy"
        assert sh(copy, "cat /etc/machine-id") != sh(box, "cat /etc/machine-id")
        copy.stop()
        # cloud-init runs at this boot, and knows that it has set this disk up.
        with pytest.raises(CloudInitFailedError, match="bootcmd") as failed:
            copy.start(ready_timeout=600)
        assert "scripts" not in failed.value.message
        assert sh(copy, "cat /var/lib/booted").split() == ["again", "again"]
        assert sh(copy, "cat /var/lib/ran") == "once"
        assert sh(copy, "hostname") == "copy"


def test_an_archive_brings_the_seed_where_saved_memory_knows_it(
    box: Sandbox, cloud: Client, process: DaemonProcess, tmp_path: Path, sh: Run
) -> None:
    seed = seed_of(process, "sandboxes", box.id)
    for name, memory in (("frozen", False), ("running", True)):
        archive = tmp_path / name
        cloud.snapshots.export(name, archive, memory=memory)
        brought = cloud.snapshots.import_file(archive, name=f"brought {name}", trust=True).snapshot
        assert seed_of(process, "snapshots", brought.id) == (seed if memory else None)
    with cloud.snapshots.restore("brought running") as restored:
        assert sh(restored, "cat /etc/written") == "by cloud-init"


def test_a_seed_goes_with_its_last_user(
    box: Sandbox, cloud: Client, process: DaemonProcess
) -> None:
    seed = seed_of(process, "sandboxes", box.id)
    assert seed is not None
    blob = process.state / "blobs" / seed
    box.terminate()
    assert blob.exists()
    for snapshot in cloud.snapshots.list():
        assert blob.exists()
        cloud.snapshots.delete(snapshot.id)
    assert not blob.exists()


def seed_of(process: DaemonProcess, table: str, id: str) -> str | None:
    """The seed that a record's machine names."""
    ((seed,),) = process.rows(
        f"SELECT json_extract(machine, '$.seed') FROM {table} WHERE id = '{id}'"
    )
    return None if seed is None else str(seed)
