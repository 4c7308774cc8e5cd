"""What guests may take of the host: the figures, and groups of the kernel's own hierarchy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stratabox.daemon.config import Config, load
from stratabox.daemon.hypervisor import cgroup
from stratabox.daemon.hypervisor.housing import HouseError, Housing
from stratabox.daemon.hypervisor.limits import (
    Allowance,
    Controller,
    GroupLimits,
    IoLimits,
    group_files,
    scope_properties,
    translation_buffer,
)
from stratabox.daemon.service import housing
from stratabox.daemon.service.groups import Groups, prepare
from stratabox.storage.model.errors import DeniedError, FailedError
from stratabox.storage.model.ids import SandboxId, mint
from support.cgroups import a_folder
from support.rig import eventually

MIB, GIB = 1 << 20, 1 << 30
ID = SandboxId("0" * 8)
PLAIN = Allowance(memory=256 * MIB, cpu=100, pids=256)
LIMITS = GroupLimits(memory=GIB, cpu=250, pids=300)
BUSY = IoLimits(weight=50, write_bandwidth=3 * MIB, read_iops=70)


def config(*argv: str) -> Config:
    return load(argv, {"HOME": "/home/ann"})


def test_a_guest_may_have_what_it_was_created_with_and_some_more() -> None:
    kvm = PLAIN.guest(cpus=2, memory=2048, accelerator="kvm", host_memory=65536)
    assert kvm == GroupLimits(memory=(2048 + 32 + 256) * MIB, cpu=300, pids=258)
    tcg = PLAIN.guest(cpus=2, memory=2048, accelerator="tcg", host_memory=65536)
    assert tcg == replace(kvm, memory=kvm.memory + 1280 * MIB)


def test_the_buffer_of_translated_code_depends_on_the_host() -> None:
    assert translation_buffer(65536) == translation_buffer(8192) == GIB
    assert translation_buffer(4096) == GIB // 2


def test_files_of_a_group() -> None:
    everything = frozenset(Controller)
    assert group_files(LIMITS, everything, "8:0") == {
        "memory.max": "1073741824",
        "memory.oom.group": "1",
        "cpu.max": "250000 100000",
        "pids.max": "300",
    }
    busy = replace(LIMITS, io=BUSY)
    files = group_files(busy, everything, "8:0")
    assert files["io.weight"] == "default 50"
    assert files["io.max"] == "8:0 wbps=3145728 riops=70"
    assert "io.max" not in group_files(busy, everything, None)
    assert list(group_files(busy, {Controller.PIDS}, "8:0")) == ["pids.max"]
    assert Controller.IO in busy.controllers
    assert Controller.IO not in LIMITS.controllers


def test_properties_of_a_scope() -> None:
    assert dict(scope_properties(replace(LIMITS, io=BUSY), "/state")) == {
        "MemoryMax": ("t", GIB),
        "CPUQuotaPerSecUSec": ("t", 2_500_000),
        "TasksMax": ("t", 300),
        "IOWeight": ("t", 50),
        "IOWriteBandwidthMax": ("a(st)", [("/state", 3 * MIB)]),
        "IOReadIOPSMax": ("a(st)", [("/state", 70)]),
    }


def test_the_configuration_is_an_allowance() -> None:
    found = housing.allowance_of(config("--cgroups-io-weight", "50", "--cgroups-pids", "100"))
    assert found == Allowance(memory=256 * MIB, cpu=100, pids=100, io=IoLimits(weight=50))
    assert housing.allowance_of(config("--cgroups-limits", "off")) is None


def test_bandwidth_is_of_the_whole_disk(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    assert cgroup.disk_of(tmp_path, tmp_path) is None
    (tmp_path / "sda/sda1").mkdir(parents=True)
    (tmp_path / "sda/dev").write_text("8:0\n")
    (tmp_path / name).symlink_to("sda/sda1")
    assert cgroup.disk_of(tmp_path, tmp_path) == name
    (tmp_path / "sda/sda1/partition").write_text("1\n")
    assert cgroup.disk_of(tmp_path, tmp_path) == "8:0"


# Groups of the kernel's. Controllers may all be in hierarchies of version 1: limits that hold are
# shown where systemd runs (`make test-systemd`); here, that groups come and go.


@pytest.fixture
def folder() -> Iterator[Path]:
    with a_folder() as made:
        yield made


@contextlib.contextmanager
def a_process() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "300"])
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@contextlib.asynccontextmanager
async def kept(folder: Path, tmp_path: Path) -> AsyncIterator[Groups]:
    held = prepare(folder, "store", LIMITS.controllers)
    groups = Groups(folder / "store", held, tmp_path)
    keeping = asyncio.create_task(groups.keep())
    try:
        yield groups
    finally:
        keeping.cancel()
        await asyncio.wait((keeping,))


def members(group: Path) -> set[int]:
    return set(map(int, (group / "cgroup.procs").read_text().split()))


async def test_a_group_goes_with_its_process(folder: Path, tmp_path: Path) -> None:
    async with kept(folder, tmp_path) as groups:
        with a_process() as one, a_process() as other:
            await groups.put("guest", ID, one.pid, LIMITS)
            await groups.put("network", ID, other.pid, LIMITS)
            group = groups.root / f"guest-{ID}-{one.pid}"
            assert members(group) == {one.pid}
            assert cgroup.group_of(one.pid) == group
            one.kill()
            await asyncio.to_thread(eventually, lambda: not group.exists(), 30)
            assert [each.name for each in groups.root.glob("*/")] == [f"network-{ID}-{other.pid}"]
        await asyncio.to_thread(eventually, lambda: not list(groups.root.glob("*/")), 30)
    assert not groups.root.exists()


async def test_a_process_that_is_gone_leaves_no_group(folder: Path, tmp_path: Path) -> None:
    with a_process() as one:
        pass
    async with kept(folder, tmp_path) as groups:
        with pytest.raises(HouseError, match="No such process"):
            await groups.put("guest", ID, one.pid, LIMITS)
        assert not list(groups.root.glob("*/"))


async def test_groups_outlive_the_daemon(folder: Path, tmp_path: Path) -> None:
    with a_process() as living, a_process() as dying:
        first = Groups(folder / "store", prepare(folder, "store", ()), tmp_path)
        for child in (living, dying):
            await first.put("guest", ID, child.pid, None)
        # Killed: nobody sees the end of one of them.
        first._poll.close()
        dying.kill()
        dying.wait()
        async with kept(folder, tmp_path) as groups:
            (group,) = groups.root.glob("*/")
            assert members(group) == {living.pid}
            living.kill()
            await asyncio.to_thread(eventually, lambda: not group.exists(), 30)


async def test_what_is_missing_is_said_or_refused(folder: Path, tmp_path: Path) -> None:
    limits = ["--cgroups-folder", str(folder), "--state-dir", str(tmp_path)]
    found = await housing.choose(config(*limits), {}, "store")
    assert found.house is not None
    found.house.close()
    assert found.by == str(folder)
    assert bool(found.why) == (found.held != LIMITS.controllers)
    assert not (folder / "store").exists()
    if found.why:
        with pytest.raises(DeniedError, match="no controller") as caught:
            await housing.choose(config(*limits, "--cgroups-limits", "required"), {}, "store")
        assert caught.value.reason == "CGROUPS_UNAVAILABLE"
        assert not (folder / "store").exists()


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("--cgroups-folder", "/proc/nothing"), "not in a hierarchy"),
        (("--cgroups-limits", "off"), '"off"'),
        (("--launcher", "libvirt"), "libvirt has control groups of its own"),
    ],
)
async def test_without_groups_the_reason_is_known(
    argv: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    # The host's own hierarchy, as others' tests may have it at the same time.
    found = await housing.choose(config(*argv, "--state-dir", str(tmp_path)), {}, mint())
    if found.house is not None:
        found.house.close()
    assert why in found.why
    assert not found.held


def test_a_hierarchy_that_is_systemds_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housing, "SYSTEMD_RUNS", tmp_path)
    assert housing.folder_of(config()) == (
        None,
        "systemd has this host, but did not start the daemon",
    )
    asked = config("--cgroups-folder", "/sys/fs/cgroup/ours")
    assert housing.folder_of(asked) == (Path("/sys/fs/cgroup/ours"), "")


async def test_a_guest_that_must_be_limited() -> None:
    class Full:
        async def put(self, *_: object) -> None:
            raise HouseError("no room")

        async def keep(self) -> None: ...

        def close(self) -> None: ...

    some = Housing(house=Full(), allowance=PLAIN)
    await some.network(ID, 1)
    await some._put("guest", ID, 1, LIMITS)
    with pytest.raises(FailedError, match="no room") as caught:
        await replace(some, required=True)._put("guest", ID, 1, LIMITS)
    assert caught.value.reason == "CGROUP_FAILED"
    await replace(some, required=True).network(ID, 1)
