"""libvirt as the launcher: what it shows, what it does to guests, and how they live without it.

That all else is as with the plain launcher is shown by the plain launcher's own tests: some of them
in ``test_libvirt_suite``, all of them by ``make test-libvirt``.
"""

from __future__ import annotations

import asyncio
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from integration.test_confinement import NEEDED, USER, there_are, walls_of
from stratabox.client import (
    Client,
    LibvirtUnavailableError,
    Sandbox,
    SandboxState,
    SnapshotState,
)
from stratabox.daemon.hypervisor import confinement
from stratabox.daemon.hypervisor.confinement import Walls
from stratabox.daemon.hypervisor.libvirt import connection, domain_xml, walls
from stratabox.daemon.hypervisor.libvirt.handover import Handover
from stratabox.daemon.hypervisor.libvirt.launcher import LibvirtLauncher
from stratabox.storage.model.errors import FailedError, UnavailableError
from support import counting
from support.bench import QEMU_UID, Bench, make_bench, running
from support.daemon import DaemonProcess, daemon
from support.libvirt import Libvirtd, private_libvirtd
from support.rig import eventually
from support.waiting import until

pytestmark = pytest.mark.launcher


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    with private_libvirtd() as libvirtd:
        yield libvirtd


@pytest.fixture(scope="module")
def process(
    libvirtd: Libvirtd, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    """A daemon whose guests are libvirt's domains, within all walls where this kernel has them."""
    lacks = walls.missing(confinement.landlock_version(), own_uid=True)
    wish = {"STRATABOX_CONFINEMENT": "auto" if lacks else "required"}
    with daemon(tmp_path_factory.mktemp("libvirt"), libvirtd.environment | wish) as process:
        yield process


class Scene:
    """The daemon, started again and again, and a guest that must live through all of it."""

    def __init__(self, process: DaemonProcess, libvirtd: Libvirtd) -> None:
        self.process, self.libvirtd = process, libvirtd
        self.client = process.start()
        self.client.images.build_tiny()
        self.box = self.client.sandboxes.create(
            image="tiny", memory=128, name="under libvirt", wait_for_ready=True
        )
        counting.start(self.box)
        self.pid = process.guests()[self.box.id]
        self.nonce = self.now(self.box)

    def now(self, box: Sandbox) -> str:
        """What only the memory of this guest and of its copies holds."""
        result = box.execute("cut -d ' ' -f 1,2 /mnt/test/now")
        assert result.exit_code == 0, result
        return result.stdout_text.strip()

    def restart(self, **environment: str) -> Client:
        """A new daemon on the same guests."""
        self.client.close()
        self.process.stop()
        self.client = self.process.start(environment=environment)
        self.box = self.client.sandboxes.get(self.box.id)
        return self.client

    def lives(self) -> bool:
        """It is the very process of the beginning, and answers."""
        same = self.process.guests()[self.box.id] == self.pid
        return same and self.now(self.box) == self.nonce

    def libvirt_has(self, *boxes: Sandbox) -> None:
        """libvirt lists these and no other; it notices the end of a domain a moment later."""
        wanted = {box.id for box in boxes}
        eventually(lambda: set(self.libvirtd.domains()) == wanted, what=str(wanted))


@pytest.fixture(scope="module")
def scene(process: DaemonProcess, libvirtd: Libvirtd) -> Scene:
    return Scene(process, libvirtd)


def test_virsh_shows_what_there_is(scene: Scene) -> None:
    shown = scene.libvirtd.virsh("list", "--title").stdout
    assert f"stratabox-{scene.process.store_id()}-{scene.box.id}" in shown
    assert "under libvirt" in shown
    assert "running" in shown
    about = scene.libvirtd.virsh("dominfo", scene.box.id).stdout
    assert f"{128 << 10} KiB" in about
    tree = ET.fromstring(scene.libvirtd.virsh("dumpxml", scene.box.id).stdout)
    ours = tree.find(f"metadata/{{{domain_xml.OUR_NAMESPACE}}}sandbox")
    assert ours is not None
    assert (ours.get("id"), ours.get("name")) == (scene.box.id, "under libvirt")
    # What is not in the domain's words is in nobody else's either: no path into the store.
    assert str(scene.process.state) not in ET.tostring(tree, encoding="unicode")
    assert scene.client.host().launcher == "libvirt"


def test_one_that_was_killed_starts_again_at_once(scene: Scene) -> None:
    """libvirt is then still about to remove it, and takes no domain of that name meanwhile."""
    box = scene.client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False)
    for _ in range(5):
        box.stop(force=True)
        box.start(wait_for_ready=False)
        assert box.refresh().state is SandboxState.RUNNING
    box.delete()
    scene.libvirt_has(scene.box)


def test_qemu_is_as_confined_as_ever(scene: Scene) -> None:
    status = Path(f"/proc/{scene.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    uids = {int(each) for each in fields["Uid"].split()}
    assert len(uids) == 1
    assert 0 not in uids
    assert int(fields["CapEff"], 16) == 0
    assert (fields["Seccomp"], fields["NoNewPrivs"]) == ("2", "1")
    limits = Path(f"/proc/{scene.pid}/limits").read_text()
    assert "Max core file size        0                    0" in limits
    assert Path(f"/proc/{scene.pid}/exe").readlink().name == "qemu-system-x86_64"
    for space in ("mnt", "net", "ipc", "uts", "user"):
        mine, libvirtds, its = (
            Path(f"/proc/{each}/ns/{space}").readlink()
            for each in ("self", scene.libvirtd.pid, scene.pid)
        )
        assert its not in (mine, libvirtds)
    lines = Path(f"/proc/{scene.pid}/mountinfo").read_text().splitlines()
    points = {line.split()[4] for line in lines}
    assert points >= {"/", "/proc/self", "/usr/lib", "/dev/zero"}
    assert not any(point.startswith(("/etc/s", "/home", "/tmp", "/var")) for point in points)


async def test_a_guest_that_has_taken_over_its_qemu_reaches_nothing(
    libvirtd: Libvirtd, bench: Bench
) -> None:
    """libvirtd runs a program of our own in QEMU's place, by the same code, which tries."""
    spec = await bench.spec(USER)
    virt = connection.Connection(libvirtd.uri)

    async def start(place: Handover, program: Path) -> None:
        label = domain_xml.Confinement(uid=USER, gid=USER, drivers=["dac"])
        xml = domain_xml.build(
            spec,
            "tries",
            store_id="s",
            emulator=program,
            arguments=place.arguments,
            confinement=label,
        )
        # libvirt waits for QEMU to greet, and this one never does.
        with pytest.raises(FailedError):
            await virt.call(lambda connected: connected.createXML(xml), 120)

    with there_are() as things:
        wish = walls_of(things, Walls.FULL)
        try:
            found, tried = await things.run_emulator(start, uid=USER, wish=wish)
        finally:
            await virt.close()
        assert not things.new.exists()
    judged = walls.judge(found, confinement.landlock_version(), own_uid=True)
    assert judged.walls is Walls.FULL
    assert {name for name, errno in tried.items() if errno == 0} == set(NEEDED)
    assert "device" in tried  # the last one


def test_memory_goes_over_to_the_other_launcher_and_back(scene: Scene) -> None:
    saved = scene.box.snapshot(name="of libvirt's", level="memory")
    client = scene.restart(STRATABOX_LAUNCHER="qemu")
    assert client.host().launcher == "qemu"
    assert scene.lives()
    with client.snapshots.restore(saved.id) as plain:
        assert scene.now(plain) == scene.nonce
        scene.libvirt_has(scene.box)
        back = plain.snapshot(name="of the plain one's", level="memory")
    client = scene.restart()
    with client.snapshots.restore(back.id) as again:
        assert scene.now(again) == scene.nonce
        scene.libvirt_has(scene.box, again)
        again.pause(to_disk=True)
        scene.libvirt_has(scene.box)
        again.resume()
        assert scene.now(again) == scene.nonce
    scene.libvirt_has(scene.box)
    for snapshot in (saved, back):
        client.snapshots.delete(snapshot.id)


def test_libvirtd_dies_and_comes_back(scene: Scene) -> None:
    scene.libvirtd.kill()
    try:
        assert scene.lives()
        snapshot = scene.box.snapshot(name="without libvirtd", level="memory")
        assert snapshot.state is SnapshotState.READY
        with pytest.raises(LibvirtUnavailableError, match=r"cannot be reached|went away"):
            scene.client.snapshots.restore(snapshot.id)
        assert len(scene.process.guests()) == 1
        # A daemon that starts now finds its guests all the same.
        scene.restart()
        assert scene.lives()
    finally:
        scene.libvirtd.start()
    # libvirtd has found it again, too, and neither has touched it.
    scene.libvirt_has(scene.box)
    assert scene.libvirtd.virsh("domstate", scene.box.id).stdout.strip() == "running"
    assert scene.lives()
    with scene.client.snapshots.restore(snapshot.id) as restored:
        assert scene.now(restored) == scene.nonce
        scene.libvirt_has(scene.box, restored)
        # One that ends while libvirtd is away is no domain any more when that comes back.
        scene.libvirtd.stop()
    scene.libvirtd.start()
    scene.libvirt_has(scene.box)
    assert scene.lives()
    scene.client.snapshots.delete(snapshot.id)
    scene.process.check_consistent()


def test_virsh_destroys_one(scene: Scene) -> None:
    snapshot = scene.box.snapshot(level="memory")
    with scene.client.snapshots.restore(snapshot.id) as box:
        scene.libvirtd.virsh("destroy", box.id)
        ended = until(scene.client, box.id, lambda each: each.state is not SandboxState.RUNNING)
        assert ended.state in (SandboxState.STOPPED, SandboxState.FAILED)
        assert "signal" in (ended.state_reason or "")
        eventually(lambda: "destroyed through libvirt" in scene.process.log.read_text())
        scene.libvirt_has(scene.box)
        box.start(wait_for_ready=False)
        scene.libvirt_has(scene.box, box)
    scene.client.snapshots.delete(snapshot.id)
    assert scene.lives()


@pytest.fixture
async def bench(libvirtd: Libvirtd, tmp_path: Path) -> Bench:
    return await make_bench(tmp_path)


def launcher_of(libvirtd: Libvirtd, bench: Bench) -> LibvirtLauncher:
    return LibvirtLauncher(
        bench.host,
        f"virt{os.getpid()}",
        bench.folder,
        uri=libvirtd.uri,
        emulator_folder=libvirtd.folder / "emulator",
    )


async def test_what_qemu_refuses_is_told_in_its_words(libvirtd: Libvirtd, bench: Bench) -> None:
    launcher = launcher_of(libvirtd, bench)
    spec = await bench.spec()
    bad = replace(spec, machine=replace(spec.machine, cpu_model="no-such-model"))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(launcher.close)
        with pytest.raises(FailedError, match="no-such-model") as caught:
            await launcher.start(bad)
        assert caught.value.reason == "QEMU_FAILED"
        assert await launcher.list() == []
        assert not list(spec.folder.glob("*.sock"))
        # And one that nobody waits for any more leaves nothing, however far it came.
        for seconds in (0.0, 0.1, 0.25):
            starting = asyncio.create_task(launcher.start(spec))
            await asyncio.wait((starting,), timeout=seconds)
            starting.cancel()
            await asyncio.wait((starting,))
            if not starting.cancelled():
                await launcher.stop(starting.result())
            assert await launcher.list() == []
            assert not list(spec.folder.glob("*.sock"))
        async with running(launcher, spec) as guest:
            assert Path(f"/proc/{guest.pid}").stat().st_uid == QEMU_UID
            assert await guest.sh("echo hi") == "hi"
    eventually(lambda: spec.sandbox not in libvirtd.domains())


async def test_a_libvirtd_that_hangs_is_hung_up_on(
    libvirtd: Libvirtd, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_ALIVE_SECONDS", 1)
    launcher = launcher_of(libvirtd, bench)
    spec = await bench.spec()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(launcher.close)
        # Connected, and started once: nothing is left to be found out.
        await launcher.stop(await launcher.start(spec))
        libvirtd.hang()
        try:
            with pytest.raises(UnavailableError) as caught:
                await launcher.start(spec)
            assert caught.value.reason == "LIBVIRT_UNAVAILABLE"
            assert await launcher.list() == []
        finally:
            libvirtd.wake()
        # Now it does what it was asked for. Nobody waits for that, so nothing comes of it.
        eventually(lambda: spec.sandbox not in libvirtd.domains())
        assert await launcher.list() == []
        await launcher.stop(await launcher.start(spec))
    eventually(lambda: spec.sandbox not in libvirtd.domains())
