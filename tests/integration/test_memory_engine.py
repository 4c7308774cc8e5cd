"""The memory engine by itself, on the tiny guest: RAM saved, mapped again, and compared."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.machine import SavedMemory
from stratabox.daemon.hypervisor.memory import copying, load, mapping, tracking
from stratabox.daemon.hypervisor.memory.pages import PageMap, bytes_of
from stratabox.daemon.hypervisor.memory.save import Base
from stratabox.storage.files.memory.chain import OpenChain, merge, put_in_place
from stratabox.storage.files.memory.format import verify
from stratabox.storage.files.memory.sealed import write_state
from stratabox.storage.model.errors import FailedError, InternalError, UnavailableError
from support.bench import Bench, Running, make_bench, running
from support.memory import Memories, differing_pages

MIB = 1 << 20
FRESH = Base(origin=None)
COUNTER = (
    "N=$(cat /proc/sys/kernel/random/uuid); i=0;"
    " while :; do i=$((i+1)); echo $$ $N $i >/run/new; mv /run/new /run/count; sleep 0.05; done"
)


def told(*, library: bool = True) -> str:
    """How this kernel tells written pages."""
    if library and tracking.has_write_tracking() and tracking.LIBRARY.exists():
        return "written"
    return "soft_dirty" if tracking.has_soft_dirty() else "none"


tracked = pytest.mark.skipif(
    told() != "written", reason="needs Linux 6.7 and the library that hatch_build.py makes"
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("memory")
    yield asyncio.run(make_bench(root))
    shutil.rmtree(root)


@pytest.fixture
def memories(bench: Bench, tmp_path: Path) -> Memories:
    return Memories(bench, tmp_path)


@pytest.fixture
async def guest(bench: Bench) -> AsyncIterator[Running]:
    async with running(bench.launcher, await bench.spec()) as guest:
        await guest.sh("mkdir -p /big && mount -t tmpfs -o size=90% none /big")
        yield guest


async def start_counter(guest: Running) -> None:
    await guest.sh(
        f"setsid sh -c '{COUNTER}' >/dev/null 2>&1 & until [ -s /run/count ]; do sleep 0.1; done"
    )


async def count(guest: Running) -> tuple[int, str, int]:
    pid, nonce, number = (await guest.sh("cat /run/count")).split()
    return int(pid), nonce, int(number)


async def counts_on(guest: Running, number: int) -> None:
    """Wait until it has counted beyond a number."""
    await guest.sh(
        f"while read -r pid nonce n </run/count && [ $n -le {number} ]; do sleep 0.05; done"
    )
    assert (await count(guest))[2] > number


async def fill(guest: Running, name: str, mib: int = 32) -> str:
    """Write that much to a file in the guest's RAM; its checksum."""
    await guest.sh(f"dd if=/dev/urandom of=/big/{name} bs=1M count={mib} 2>/dev/null")
    return await checksum(guest, name)


async def checksum(guest: Running, name: str) -> str:
    return (await guest.sh(f"md5sum </big/{name}"))[:32]


async def test_a_process_goes_on_through_two_generations(
    guest: Running, memories: Memories
) -> None:
    await start_counter(guest)
    await guest.sh("echo first >/disk && sync")
    before = await count(guest)
    first = await memories.take(guest, FRESH)
    async with memories.restored(guest, first) as second:
        pid, nonce, number = await count(second)
        assert (pid, nonce) == before[:2]
        assert number >= before[2]
        await counts_on(second, number)
        assert await second.sh("cat /disk") == "first"
        await second.sh("echo second >/disk && sync")
        later = await count(second)
        kept = await memories.take(second, Base(origin=first.saved.file.id))
        assert kept.saved.file.parent == first.saved.file.id
        assert kept.saved.file.own_bytes < first.saved.file.own_bytes / 4
    async with memories.restored(second, kept) as third:
        assert await third.sh("cat /disk") == "second"
        after = await count(third)
        assert (after[0], after[1]) == before[:2]
        assert number < later[2] <= after[2]
        # The source is none the worse for it.
        assert (await count(guest))[:2] == before[:2]
        assert await guest.sh("cat /disk") == "first"
        text = await third.domain._monitor.execute(
            "human-monitor-command", {"command-line": "info ramblock"}
        )
        blocks = {line.split()[0] for line in str(text).splitlines()[1:] if line.strip()}
        # isa-bios, a copy of the flash's end, is no block of its own in newer QEMUs.
        assert blocks | {"isa-bios"} == {
            "ram", "system.flash0", "isa-bios", "pc.rom",
            "/rom@etc/acpi/tables", "/rom@etc/table-loader", "/rom@etc/acpi/rsdp",
        }  # fmt: skip


@pytest.mark.skipif(told() == "none", reason="needs a kernel that tells which pages were written")
async def test_snapshots_in_a_row_cost_what_was_written_in_between(
    guest: Running, memories: Memories
) -> None:
    sums, kept = [], []
    base = FRESH
    for number in range(5):
        sums.append(await fill(guest, f"file{number % 2}"))
        kept.append(await memories.take(guest, base))
        base = kept[-1].saved.base
    for each in kept[1:]:
        assert each.saved.tracked == told()
        assert 32 * MIB <= each.saved.file.own_bytes < 45 * MIB
        assert told() == "soft_dirty" or each.saved.copied_stopped < 8 * MIB
    for number in (4, 1):
        async with memories.restored(guest, kept[number]) as restored:
            assert await checksum(restored, f"file{number % 2}") == sums[number]
    # A snapshot in the middle goes; those on both sides of it stand.
    with OpenChain(kept[3].saved.file.id, memories.path, guest.spec.memory * MIB) as opened:
        chain = opened.files
        merged = merge(opened, memories.folder / "merged", until=chain[1].parent)
    assert merged is not None
    put_in_place(merged.path, chain[0].path)
    chain[1].path.unlink()
    for number in (4, 3, 1):
        async with memories.restored(guest, kept[number]) as restored:
            assert await checksum(restored, f"file{number % 2}") == sums[number]
            assert await checksum(restored, f"file{1 - number % 2}") == sums[number - 1]


@pytest.mark.parametrize(
    ("library", "most_kept"),
    [
        pytest.param(True, copying.MOST_KEPT, marks=tracked),
        pytest.param(True, 2 * MIB, marks=tracked),
        (False, copying.MOST_KEPT),
        (False, 2 * MIB),
    ],
)
async def test_all_of_ram_is_as_it_was(
    bench: Bench,
    memories: Memories,
    monkeypatch: pytest.MonkeyPatch,
    library: bool,
    most_kept: int,
) -> None:
    """Whole RAM compared, five times, with processes and disk reads writing to it."""
    monkeypatch.setattr(copying, "MOST_KEPT", most_kept)
    monkeypatch.setattr(copying, "_affordable", lambda: most_kept)
    if not library:
        monkeypatch.setattr(tracking, "LIBRARY", Path("/nowhere"))
    load_line = (
        "while :; do dd if=/dev/urandom of=/big/a bs=64k count=64 2>/dev/null;"
        " echo 3 >/proc/sys/vm/drop_caches; cat /bin/busybox >/dev/null; done"
    )
    async with running(bench.launcher, await bench.spec()) as guest:
        await guest.sh("mkdir -p /big && mount -t tmpfs none /big")
        await guest.sh(f"setsid sh -c '{load_line}' >/dev/null 2>&1 &")
        resume = guest.domain.resume

        async def stay() -> None:
            """Leave the guest as it was saved."""

        base = FRESH
        for _ in range(5):
            await asyncio.sleep(0.3)
            monkeypatch.setattr(guest.domain, "resume", stay)
            kept = await memories.take(guest, base)
            monkeypatch.setattr(guest.domain, "resume", resume)
            assert kept.saved.tracked == told(library=library)
            whole = base is FRESH or kept.saved.tracked == "none"
            assert (kept.saved.file.parent is None) == whole
            base = kept.saved.base
            ram = memories.ram(kept)
            try:
                assert await differing_pages(guest, ram) == []
            finally:
                os.close(ram)
            verify(kept.saved.file)
            await guest.domain.cont()


async def test_a_restored_guest_has_the_same_ram(guest: Running, memories: Memories) -> None:
    await fill(guest, "file")
    kept = await memories.take(guest, FRESH)
    ram = memories.ram(kept)
    state = os.open(memories.folder / f"{kept.saved.file.id}.state", os.O_RDONLY)
    spec = memories.bench.restored(guest.spec, SavedMemory(ram=ram, state=state), kept.disks)
    handle = await memories.bench.launcher.start(spec)
    try:
        domain = await Domain.attach(handle, lambda event: None)
        await load.load_devices(domain, wired=spec.machine.uplink)
        assert await domain.status() == "paused"
        restored = Running(spec, domain, guest.agent)
        # QEMU writes the new generation id into the guest, KVM its clock, and nobody anything else.
        most = 2 if spec.machine.accelerator == "kvm" else 1
        assert len(await differing_pages(restored, ram)) <= most
        await domain.detach()
    finally:
        await memories.bench.launcher.stop(handle)
        os.close(ram)
        os.close(state)


async def test_a_restored_guest_can_be_rebooted(guest: Running, memories: Memories) -> None:
    await guest.sh("touch /big/here")
    first = await memories.take(guest, FRESH)
    async with memories.restored(guest, first) as second:
        kept = await memories.take(second, Base(origin=first.saved.file.id))
        await reboot(second)
    async with memories.restored(second, kept) as third:
        assert await third.sh("ls /big") == "here"
        await reboot(third)


async def reboot(guest: Running) -> None:
    before = await boot_id(guest)
    await guest.sh("(sleep 0.5; reboot -f) >/dev/null 2>&1 &")
    async with asyncio.timeout(180):
        while True:
            if await boot_id(guest) not in (before, None):
                break
            await asyncio.sleep(0.1)
    assert await guest.sh("ls /big") == ""


async def boot_id(guest: Running) -> str | None:
    """None while nobody answers."""
    try:
        return await guest.sh("cat /proc/sys/kernel/random/boot_id")
    except UnavailableError:
        return None


async def test_clones_share_what_they_do_not_write(guest: Running, memories: Memories) -> None:
    expected = await fill(guest, "file", 64)
    kept = await memories.take(guest, FRESH)
    async with AsyncExitStack() as stack:
        ram = memories.ram(kept)
        stack.callback(os.close, ram)
        state = os.open(memories.folder / f"{kept.saved.file.id}.state", os.O_RDONLY)
        stack.callback(os.close, state)
        saved = SavedMemory(ram=ram, state=state)
        specs = [memories.bench.restored(guest.spec, saved, kept.disks) for _ in range(8)]
        clones = await asyncio.gather(
            *(stack.enter_async_context(running(memories.bench.launcher, spec)) for spec in specs)
        )
        assert await asyncio.gather(*(checksum(clone, "file") for clone in clones)) == [
            expected
        ] * len(clones)
        inode = os.fstat(ram).st_ino
        for clone in clones:
            path, size = await clone.domain.memory.ram_file()
            assert Path(path.replace("self", str(clone.pid))).stat().st_ino == inode
            where = mapping.find(clone.pid, path, size)
            own = await asyncio.to_thread(private_bytes, where)
            assert own < 32 * MIB
        # One writes, the others do not see it.
        await fill(clones[0], "file", 64)
        assert await checksum(clones[1], "file") == expected


def private_bytes(where: mapping.RamMapping) -> int:
    with PageMap(where) as page_map:
        return bytes_of(page_map.private())


async def test_a_save_that_fails_leaves_the_guest_running(
    guest: Running, memories: Memories, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start_counter(guest)
    first = await memories.take(guest, FRESH)
    expected = await fill(guest, "file")

    async def refuse() -> None:
        raise FailedError("no disk")

    with pytest.raises(FailedError, match="no disk"):
        await memories.take(guest, first.saved.base, also=refuse)
    assert await guest.domain.status() == "running"
    assert len(list(memories.folder.iterdir())) == 2
    number = (await count(guest))[2]
    # Cancelled right before the pause, where it stands still until then.
    begun, cancelled = asyncio.Event(), threading.Event()
    loop, expect = asyncio.get_running_loop(), copying.RamCopy.expect

    def stand_still(copy: copying.RamCopy, size: int) -> None:
        loop.call_soon_threadsafe(begun.set)
        cancelled.wait(60)
        expect(copy, size)

    with monkeypatch.context() as patched:
        patched.setattr(copying.RamCopy, "expect", stand_still)
        taking = asyncio.create_task(memories.take(guest, FRESH))
        await begun.wait()
        taking.cancel()
        cancelled.set()
        await asyncio.wait((taking,))
    assert taking.cancelled()
    assert await guest.domain.status() == "running"
    assert len(list(memories.folder.iterdir())) == 2
    await counts_on(guest, number)
    # What the failed ones took is not lost: nothing is trusted any more but the process itself.
    kept = await memories.take(guest, FRESH)
    async with memories.restored(guest, kept) as restored:
        assert await checksum(restored, "file") == expected


async def test_a_paused_guest_stays_paused(guest: Running, memories: Memories) -> None:
    expected = await fill(guest, "file")
    await guest.domain.pause()
    kept = await memories.take(guest, FRESH)
    assert await guest.domain.status() == "paused"
    assert not kept.saved.pause
    async with memories.restored(guest, kept) as restored:
        assert await checksum(restored, "file") == expected


async def test_what_is_not_sealed_or_damaged_is_refused(guest: Running, memories: Memories) -> None:
    kept = await memories.take(guest, FRESH)
    bench = memories.bench
    ram = memories.ram(kept)
    path = memories.folder / f"{kept.saved.file.id}.state"
    state = os.open(path, os.O_RDONLY)
    with pytest.raises(PermissionError):
        os.pwrite(ram, b"x", 0)
    with pytest.raises(PermissionError):
        os.truncate(ram, 4096)
    larger = SavedMemory(ram=ram, state=state)
    spec = bench.restored(guest.spec, larger, kept.disks)
    with pytest.raises(InternalError, match="size"):
        await bench.launcher.start(replace(spec, memory=512))
    unsealed = os.memfd_create("ram")
    os.truncate(unsealed, guest.spec.memory * MIB)
    spec = bench.restored(guest.spec, SavedMemory(ram=unsealed, state=state), kept.disks)
    with pytest.raises(InternalError, match="sealed"):
        await bench.launcher.start(spec)
    # What slips through all checks of ours: QEMU's own words are told.
    short = memories.folder / "short"
    await asyncio.to_thread(write_state, short, path.read_bytes()[:5000])
    damaged = os.open(short, os.O_RDONLY)
    spec = bench.restored(guest.spec, SavedMemory(ram=ram, state=damaged), kept.disks)
    with pytest.raises(FailedError, match="QEMU") as caught:
        async with running(bench.launcher, spec):
            pass
    assert caught.value.reason == "QEMU_FAILED"
    assert "load" in caught.value.message
    for descriptor in (ram, state, unsealed, damaged):
        os.close(descriptor)
