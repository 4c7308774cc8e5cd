"""The hypervisor package by itself, on the tiny guest: what no test of the daemon can look at."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor import cgroup, confinement
from stratabox.daemon.hypervisor.confinement import PLAIN, Walls
from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.guest.exec import execute
from stratabox.daemon.hypervisor.host_room import look
from stratabox.daemon.hypervisor.housing import Housing
from stratabox.daemon.hypervisor.limits import Allowance, translation_buffer
from stratabox.daemon.hypervisor.qemu import QemuLauncher
from stratabox.daemon.hypervisor.qmp import ReplyLostError
from stratabox.daemon.service.groups import Groups, prepare
from stratabox.storage.model.errors import CorruptError, FailedError, UnavailableError
from support.bench import QEMU_UID, Bench, Running, make_bench, running
from support.cgroups import a_folder
from support.rig import eventually


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("hypervisor")
    yield asyncio.run(make_bench(root))
    shutil.rmtree(root)


@pytest.fixture
async def guest(bench: Bench) -> AsyncIterator[Running]:
    async with running(bench.launcher, await bench.spec()) as guest:
        yield guest


def open_modes(pid: int, path: Path) -> set[int]:
    """Access modes (O_RDONLY, O_RDWR) by which a process has a file open."""
    modes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if link.readlink() == path:
                info = (link.parent.parent / "fdinfo" / link.name).read_text()
                modes.add(int(info.split("flags:")[1].split()[0], 8) & os.O_ACCMODE)
    return modes


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_confinement(bench: Bench, guest: Running) -> None:
    status = Path(f"/proc/{guest.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    if QEMU_UID is not None:
        assert fields["Uid"].split() == fields["Gid"].split() == [str(QEMU_UID)] * 4
        assert fields["Groups"].split() == []
    assert fields["Seccomp"].strip() == "2"
    limits = Path(f"/proc/{guest.pid}/limits").read_text()
    assert "Max core file size        0                    0 " in limits
    active, image = guest.spec.disks[0].chain
    assert open_modes(guest.pid, active.path) == {os.O_RDONLY, os.O_RDWR}
    assert open_modes(guest.pid, image.path) == {os.O_RDONLY}
    assert os.getsid(guest.pid) == guest.pid
    if confinement.examine(bench.host.path).walls is not Walls.FULL:
        return
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["NSpid"].split()[1:] == ["1"]
    for space in ("mnt", "pid", "net", "ipc", "uts"):
        assert (
            Path(f"/proc/{guest.pid}/ns/{space}").readlink()
            != Path(f"/proc/self/ns/{space}").readlink()
        )
    lines = Path(f"/proc/{guest.pid}/mountinfo").read_text().splitlines()
    points = {line.split()[4] for line in lines}
    assert points >= {"/", "/proc", "/usr/lib", "/dev/zero", str(bench.host.path)}
    assert not any(point.startswith(("/etc/s", "/home", "/tmp", "/var")) for point in points)


async def test_it_comes_up_in_a_group_of_its_own(bench: Bench) -> None:
    allowance = Allowance(memory=256 << 20, cpu=100, pids=256)
    with a_folder() as folder:
        groups = Groups(folder / "store", prepare(folder, "store", ()), bench.root)
        keeping = asyncio.create_task(groups.keep())
        housing = Housing(house=groups, by=str(folder), allowance=allowance, required=True)
        launcher = QemuLauncher(bench.host, f"test{os.getpid()}", bench.folder, PLAIN, housing)
        spec = await bench.spec()
        try:
            handle = await launcher.start(spec)
            try:
                group = groups.root / f"guest-{spec.sandbox}-{handle.pid}"
                assert cgroup.group_of(handle.pid) == group
                if spec.machine.accelerator == "tcg":
                    # What the limit of memory is counted from, as QEMU has it.
                    assert code_buffer(handle.pid) <= translation_buffer(look().total)
            finally:
                await launcher.stop(handle)
            await asyncio.to_thread(eventually, lambda: not group.exists())
            keeping.cancel()
            await asyncio.wait((keeping,))
            # A group that must be and cannot: nothing is left running.
            with pytest.raises(FailedError, match="control group") as caught:
                await launcher.start(await bench.spec())
            assert caught.value.reason == "CGROUP_FAILED"
            assert await launcher.list() == []
        finally:
            keeping.cancel()
            await asyncio.wait((keeping,))


def code_buffer(pid: int) -> int:
    """Bytes of the largest mapping that a process may write and execute."""
    rows = (line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    ranges = (row[0].split("-") for row in rows if row[1] == "rwxp")
    return max(int(end, 16) - int(start, 16) for start, end in ranges)


async def test_switch_under_load_seals_the_old_layer(bench: Bench, guest: Running) -> None:
    line = "i=0; until [ -e /run/enough ]; do i=$((i+1)); echo $i >/seq; sync; done"
    load = asyncio.create_task(execute(guest.agent, ["sh", "-c", line], timeout=300))
    await guest.sh("until [ -s /seq ]; do sleep 0.1; done")
    old = guest.spec.disks[0].chain[0]
    for _ in range(3):
        new = bench.overlay(old.path)
        await guest.domain.disks.prepare([new])
        await guest.domain.disks.switch([(old, new)])
        assert await guest.domain.disks.active_layers() == {0: new.node}
        assert open_modes(guest.pid, old.path) == {os.O_RDONLY}
        before = digest(old.path), digest(new.path)
        # With the second number after this one the first is on the disk.
        await guest.sh(
            'until n=$(cat /seq) && [ -n "$n" ]; do :; done;'
            ' until [ "$(cat /seq)" -gt $((n+1)) ]; do sleep 0.1; done 2>/dev/null'
        )
        assert digest(old.path) == before[0]
        assert digest(new.path) != before[1]
        old = new
    await guest.sh("touch /run/enough")
    assert (await load).exit_code == 0
    assert int(await guest.sh("cat /seq")) > 0


async def test_a_switch_of_a_paused_guest_seals_when_it_runs_on(
    bench: Bench, guest: Running
) -> None:
    old = guest.spec.disks[0].chain[0]
    new = bench.overlay(old.path)
    await guest.domain.pause()
    await guest.domain.disks.prepare([new])
    await guest.domain.disks.switch([(old, new)])
    await guest.domain.cont()
    assert open_modes(guest.pid, old.path) == {os.O_RDONLY}


async def test_a_switch_whose_reply_is_lost_is_settled(
    bench: Bench, guest: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = guest.domain.disks._monitor
    real = monitor.execute

    async def losing(command: str, *arguments: object, **options: object) -> object:
        result = await real(command, *arguments, **options)  # type: ignore[arg-type]
        if command == "transaction":
            raise ReplyLostError("lost", name="qmp.sock", command=command)
        return result

    old = guest.spec.disks[0].chain[0]
    new = bench.overlay(old.path)
    await guest.domain.disks.prepare([new])
    monkeypatch.setattr(monitor, "execute", losing)
    await guest.domain.disks.switch([(old, new)])
    monkeypatch.undo()
    assert await guest.domain.disks.active_layers() == {0: new.node}


async def test_a_refused_switch_changes_nothing(bench: Bench, guest: Running) -> None:
    old = guest.spec.disks[0].chain[0]
    known, unknown = bench.overlay(old.path), bench.overlay(old.path)
    await guest.domain.disks.prepare([known])
    pairs = [(old, known), (old, unknown)]
    with pytest.raises(FailedError):
        await guest.domain.disks.switch(pairs)
    assert await guest.domain.disks.active_layers() == {0: old.node}
    await guest.domain.disks.drop([known, unknown])
    assert open_modes(guest.pid, known.path) == set()


async def test_freeze_and_late_freeze(guest: Running) -> None:
    assert await guest.agent.fsfreeze_freeze(30) > 0
    assert await guest.agent.fsfreeze_status() == "frozen"
    assert await guest.agent.fsfreeze_thaw() > 0
    with pytest.raises(UnavailableError):
        await guest.agent.fsfreeze_freeze(0.0005)
    await guest.agent.ensure_thawed(30)
    assert await guest.sh("echo x >/x; sync; cat /x") == "x"


async def test_a_timeout_leaves_no_process_behind(guest: Running) -> None:
    line = "trap '' TERM; echo begun; env -i setsid sleep 4321 & setsid sleep 4321 & sleep 4321"
    result = await execute(guest.agent, ["sh", "-c", line], timeout=5)
    assert (result.timed_out, result.stdout) == (True, b"begun\n")
    assert await guest.sh("ps | grep '[4]321' || echo none") == "none"


async def test_a_cancelled_command_is_killed_in_the_guest(guest: Running) -> None:
    task = asyncio.create_task(execute(guest.agent, ["sleep", "4321"]))
    await guest.sh("until ps | grep -q '[4]321'; do :; done")
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert await guest.sh("ps | grep '[4]321' || echo none") == "none"


async def test_memory_blocks_are_the_known_ones(guest: Running) -> None:
    text = await guest.domain._monitor.execute(
        "human-monitor-command", {"command-line": "info ramblock"}
    )
    blocks = {line.split()[0] for line in str(text).splitlines()[1:] if line.strip()}
    assert blocks == {
        "ram", "system.flash0", "isa-bios", "pc.rom",
        "/rom@etc/acpi/tables", "/rom@etc/table-loader", "/rom@etc/acpi/rsdp",
    }  # fmt: skip


async def test_a_guest_outlives_a_killed_daemon(bench: Bench) -> None:
    spec = await bench.spec()
    handle = await bench.launcher.start(spec)
    try:
        program = (
            "import asyncio, os, signal, sys\n"
            "from pathlib import Path\n"
            "from stratabox.daemon.hypervisor.domain import Domain\n"
            "from stratabox.daemon.hypervisor.machine import DomainHandle\n"
            "async def main(pid, started, sandbox, folder):\n"
            "    handle = DomainHandle(sandbox=sandbox, pid=int(pid), started=int(started),"
            " folder=Path(folder))\n"
            "    domain = await Domain.attach(handle, print)\n"
            "    await domain.set_link(up=False)\n"
            "    await domain.cont()\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "asyncio.run(main(*sys.argv[1:]))\n"
        )
        values = (handle.pid, handle.started, spec.sandbox, spec.folder)
        command = [sys.executable, "-c", program, *map(str, values)]
        daemon = await asyncio.create_subprocess_exec(*command)
        assert await daemon.wait() == -signal.SIGKILL
        assert await bench.launcher.find(spec.sandbox, spec.folder) == handle
        assert handle in await bench.launcher.list()
        domain = await Domain.attach(handle, lambda event: None)
        try:
            assert await domain.status() == "running"
        finally:
            await domain.detach()
    finally:
        await bench.launcher.stop(handle)
    assert not bench.launcher.is_alive(handle)
    left = {path.name for path in spec.folder.iterdir()}
    assert left - {"console.log"} == {"qemu.log"}  # its daemon may have heard something


@pytest.mark.parametrize(
    ("line", "words", "by_guest"),
    [
        ("poweroff -f", "powered itself off", True),
        ("", "killed by signal 9", False),
    ],
)
async def test_why_a_guest_ended(guest: Running, line: str, words: str, by_guest: bool) -> None:
    if line:
        with pytest.raises(UnavailableError):
            await execute(guest.agent, ["sh", "-c", line])
    else:
        os.kill(guest.pid, signal.SIGKILL)
    ended = await asyncio.wait_for(asyncio.shield(guest.domain.exited), 120)
    assert words in ended.reason
    assert ended.guest is by_guest


async def test_a_panic_is_told_and_the_console_can_be_read(guest: Running) -> None:
    # The driver is loaded after the agent has started.
    await guest.sh("until ls -d /sys/bus/pci/drivers/pvpanic*; do sleep 0.1; done")
    crash = "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger"
    task = asyncio.create_task(execute(guest.agent, ["sh", "-c", crash]))
    deadline = time.monotonic() + 120
    while await guest.domain.status() != "guest-panicked":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
    # What it said last is read beside that.
    await asyncio.to_thread(eventually, lambda: "sysrq" in guest.domain.console.tail())
    task.cancel()
    await guest.domain.quit()
    ended = await asyncio.wait_for(asyncio.shield(guest.domain.exited), 120)
    assert "panicked" in ended.reason
    await asyncio.wait((task,))


async def test_a_start_that_fails_leaves_nothing(bench: Bench) -> None:
    spec = await bench.spec()
    broken = replace(spec, machine=replace(spec.machine, machine_type="pc-q35-99.9"))
    with pytest.raises(FailedError, match="unsupported machine type"):
        await bench.launcher.start(broken)
    absent = replace(spec.disks[0], chain=[bench.overlay(spec.disks[0].chain[0].path)])
    absent.chain[0].path.unlink()
    with pytest.raises(CorruptError):
        await bench.launcher.start(replace(spec, disks=[absent]))
    starting = asyncio.create_task(bench.launcher.start(spec))
    await asyncio.sleep(0.01)
    starting.cancel()
    await asyncio.wait((starting,))
    assert await bench.launcher.find(spec.sandbox, spec.folder) is None
    assert [path.name for path in spec.folder.iterdir()] == ["qemu.log"]
