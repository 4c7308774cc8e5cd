"""What libvirt is told, and the program that it runs as QEMU, here with another one behind it."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor.confinement import PLAIN, Reopened, Walls
from stratabox.daemon.hypervisor.libvirt import domain_xml, emulator, walls
from stratabox.daemon.hypervisor.libvirt.domain_xml import QEMU_NAMESPACE, Confinement
from stratabox.daemon.hypervisor.libvirt.handover import FIRST, Handover
from stratabox.daemon.hypervisor.machine import DomainSpec
from stratabox.storage.model.errors import FailedError
from stratabox.storage.model.ids import SandboxId, Sha256, mint
from stratabox.storage.model.records import Machine

MONITOR = ("-chardev", "socket,id=charmonitor,fd=9", "-mon", "chardev=charmonitor,id=monitor")


def make_spec(title: str, accelerator: str = "tcg") -> DomainSpec:
    machine = Machine(
        machine_type="pc-q35-7.2",
        accelerator=accelerator,
        cpu_model="max",
        qemu_version="7.2.0",
        firmware={"bios-256k.bin": Sha256("0" * 64)},
        mac="52:54:00:12:34:56",
        kernel_boot=None,
    )
    return DomainSpec(
        sandbox=SandboxId(mint()),
        machine=machine,
        cpus=3,
        memory=512,
        vmgenid=mint(),
        disks=[],
        firmware_dir=Path("/fw"),
        kernel=None,
        initrd=None,
        folder=Path("/x"),
        uid=7,
        title=title,
    )


def xml(spec: DomainSpec, *drivers: str) -> ET.Element:
    confinement = Confinement(uid=7, gid=8, drivers=drivers)
    text = domain_xml.build(
        spec,
        "box",
        store_id="s",
        emulator=Path("/e/qemu-system-x86_64"),
        arguments=["-stratabox", "n", "0"],
        confinement=confinement,
    )
    return ET.fromstring(text)


def test_libvirt_is_told_what_it_shows() -> None:
    spec = make_spec('<a> & "b"\n\x00 é')
    tree = xml(spec, "dac", "apparmor", "none")
    assert tree.findtext("uuid") == spec.sandbox
    assert tree.findtext("title") == '<a> & "b" é'
    assert (tree.findtext("vcpu"), tree.findtext("memory")) == ("3", "512")
    ours = tree.find(f"metadata/{{{domain_xml.OUR_NAMESPACE}}}sandbox")
    assert ours is not None
    assert (ours.get("id"), ours.get("store")) == (spec.sandbox, "s")
    labels = {each.get("model"): each.get("type") for each in tree.iter("seclabel")}
    assert labels == {"dac": "static", "apparmor": "none"}
    assert tree.findtext("seclabel/label") == "+7:+8"
    passed = [each.get("value") for each in tree.iter(f"{{{QEMU_NAMESPACE}}}arg")]
    assert passed == ["-stratabox", "n", "0"]


def test_a_session_has_no_users_to_choose_from() -> None:
    assert list(xml(make_spec("")).iter("seclabel")) == []
    assert xml(make_spec("")).find("title") is None
    assert xml(make_spec("", "kvm")).get("type") == "kvm"


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    """What stands behind the emulator here: it tells how it was started."""
    program = tmp_path / "behind"
    program.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable} -I
        import os, sys
        for name in sorted(os.listdir("/proc/self/fd"), key=int):
            if int(name) >= {FIRST}:
                print(name, os.read(int(name), 100).decode())
        print(sys.argv[1:], sorted(os.environ.items()), flush=True)
        """)
    )
    program.chmod(0o755)
    return program


@pytest.fixture
def placed(tmp_path: Path, qemu: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not emulator.PROGRAM.exists():
        pytest.skip("there was no C compiler")
    before = os.umask(0o077)  # as the system's service has it
    monkeypatch.setattr(emulator, "closed_folder", lambda path: None)  # pytest's are private
    try:
        program = emulator.place(tmp_path / "above" / "folder", qemu)
    finally:
        os.umask(before)
    for each in (program, *program.parents[:3]):
        assert stat.S_IMODE(each.stat().st_mode) == 0o755
    return program


def a_file(text: str) -> int:
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    return reading


async def test_it_becomes_qemu_with_all_that_it_is_given(placed: Path, tmp_path: Path) -> None:
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    files = [a_file(f"file {each}") for each in range(450)]  # more than one message takes
    try:
        with Handover(placed.parent, os.geteuid(), "s") as place:
            command = [str(placed), "-name", "guest=x", *MONITOR, *place.arguments, "-msg", "x"]
            child = await asyncio.create_subprocess_exec(*command, env={"HOME": "/libvirt"})
            await place.give(["-S", "a b", "é"], {"A": "1", "B": "2=3"}, [*files, log])
            assert place.pid == child.pid
        assert await child.wait() == 0
    finally:
        for each in (*files, log):
            os.close(each)
    *told, last = (tmp_path / "log").read_text().splitlines()
    assert told == [f"{FIRST + each} file {each}" for each in range(450)]
    shown = dict(A="1", B="2=3")
    assert last.startswith(str(["-S", "a b", "é", *MONITOR]))
    assert all(repr(item) in last for item in shown.items())
    assert "libvirt" not in last


def test_asked_what_qemu_can_do_it_is_qemu(placed: Path) -> None:
    done = subprocess.run([placed, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("['--version']")


def run(placed: Path, *arguments: str) -> str:
    done = subprocess.run([placed, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr


def test_nobody_waits_for_it_any_more(placed: Path) -> None:
    with Handover(placed.parent, os.geteuid(), "s") as place:
        pass
    assert "does not wait for it" in run(placed, *MONITOR, *place.arguments)


def test_it_trusts_only_the_daemon_s_user(placed: Path) -> None:
    with Handover(placed.parent, os.geteuid(), "s") as place:
        option, name, _ = place.arguments
        assert "not the daemon's" in run(placed, *MONITOR, option, name, "54321")


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder in which a socket can be named: with 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        yield Path(folder)


async def test_one_of_another_user_gets_nothing(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "chown", lambda *_: None)  # to that user, which only root may do
    with Handover(short_path, os.geteuid() + 1, "s") as place:
        giving = asyncio.create_task(place.give(["x"], {}, [0]))
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(stranger, str(short_path / place.arguments[1]))
            assert await loop.sock_recv(stranger, 1) == b""
        assert place.pid is None
        giving.cancel()
        await asyncio.wait((giving,))


async def test_one_that_goes_away_is_said_so(short_path: Path) -> None:
    with Handover(short_path, os.geteuid(), "s") as place:
        giving = asyncio.create_task(place.give(["x"], {}, [0]))
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(short_path / place.arguments[1]))
        with pytest.raises(FailedError, match="did not take its files"):
            await giving


def test_a_broken_one_is_put_in_place_again(placed: Path, qemu: Path, tmp_path: Path) -> None:
    again = emulator.place(placed.parents[1], qemu)
    assert again == placed
    placed.write_bytes(b"half")
    assert emulator.place(placed.parents[1], qemu) == placed
    assert placed.read_bytes() == emulator.PROGRAM.read_bytes()
    assert stat.S_IMODE(placed.stat().st_mode) == 0o755
    os.utime(qemu, (1, 1))  # another QEMU: libvirt must ask it again
    assert emulator.place(placed.parents[1], qemu) != placed
    assert not list(placed.parents[1].glob(".new-*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's guests have other users")
def test_a_folder_that_qemu_cannot_enter(tmp_path: Path, qemu: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(FailedError, match="cannot enter"):
        emulator.place(tmp_path / "folder", qemu)


@pytest.mark.parametrize(
    ("line", "landlock", "own_uid", "expected", "why"),
    [
        ("full", 7, True, Walls.FULL, ""),
        ("full", 3, True, Walls.FULL, ""),
        ("full", 3, False, Walls.FULL, "takes Landlock 6"),
        ("full", 0, True, Walls.FULL, "no Landlock"),
        ("paths confine: unshare: errno 1", 7, True, Walls.PATHS, "no namespaces (unshare: errno"),
        ("paths confine: unshare: errno 1", 0, True, Walls.PLAIN, "errno 1; this kernel has no"),
        ("plain they are built on x86-64", 7, True, Walls.PLAIN, "x86-64"),
        ("off", 7, True, Walls.PLAIN, "switched off"),
        ("an answer of another version", 7, True, Walls.PLAIN, "of another version"),
    ],
)
def test_what_it_found_is_judged(
    line: str, landlock: int, own_uid: bool, expected: Walls, why: str
) -> None:
    found = walls.judge(line, landlock, own_uid=own_uid)
    assert found.walls is expected
    assert (why in found.why) if why else not found.why


def test_what_it_is_told_of_walls() -> None:
    wish = walls.wanted(Path("/usr/bin/qemu"))
    reopened = Reopened(folders={512: Path("/store/firmware")}, files=[513], devices=[514])
    shared = walls.options(wish, reopened=reopened, kvm=True, own_uid=False)
    assert "space=umnih" in shared  # libvirt goes by the pid of what it has started
    assert {"landlock=1", "tree=/usr/bin/qemu", "device=/dev/kvm"} < set(shared)
    assert {"folder=512:/store/firmware", "file=513", "opened=514"} < set(shared)
    own = walls.options(wish, reopened=reopened, kvm=False, own_uid=True)
    assert set(shared) - set(own) == {"device=/dev/kvm", "folder=512:/store/firmware"}
    assert set(own) - set(shared) == {"folder=512"}
    assert walls.options(PLAIN, reopened=reopened, kvm=False, own_uid=True) == []
