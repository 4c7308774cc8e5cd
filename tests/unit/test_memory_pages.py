"""Which pages were written, told by the kernel: on memory of our own, with every means."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import subprocess
from collections.abc import Iterator

import pytest

from stratabox.daemon.hypervisor.memory import fits, mapping, pages, reader, tracking
from stratabox.daemon.hypervisor.memory.mapping import PAGE, RamMapping
from stratabox.daemon.hypervisor.memory.pages import PageMap, bytes_of, joined, pieces_of
from stratabox.storage.model.errors import UnavailableError
from stratabox.storage.model.ids import Sha256
from stratabox.storage.model.records import Machine

PAGES = 3000


@pytest.fixture
def written() -> Iterator[tuple[RamMapping, list[int]]]:
    """A private mapping of a sealed file that is not all zeros, and the pages written in it."""
    descriptor = os.memfd_create("test")
    os.truncate(descriptor, PAGES * PAGE)
    os.pwrite(descriptor, os.urandom(100 * PAGE), 50 * PAGE)
    memory = mmap.mmap(descriptor, PAGES * PAGE, mmap.MAP_PRIVATE)
    numbers = sorted(random.Random(7).sample(range(PAGES), 700))
    sum(memory[page * PAGE] for page in range(PAGES))  # read: not private for that
    for page in numbers:
        memory[page * PAGE] = page % 251 + 1
    pin = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(pin)
    path = f"/proc/self/fd/{descriptor}"
    found = mapping.find(os.getpid(), path, PAGES * PAGE)
    assert found == RamMapping(pid=os.getpid(), start=start, size=PAGES * PAGE)
    with pytest.raises(UnavailableError, match="does not map"):
        mapping.find(os.getpid(), path, PAGES * PAGE * 2)
    yield found, numbers
    del pin
    memory.close()
    os.close(descriptor)


def listed(runs: pages.Runs) -> list[int]:
    return [page for first, count in runs for page in range(first, first + count)]


def test_private_pages_by_all_means(
    written: tuple[RamMapping, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, numbers = written
    with PageMap(where) as page_map:
        scanned = page_map.private()
        assert listed(scanned) == numbers
        monkeypatch.setattr(pages, "_PAGEMAP_SCAN", 0xC0606611)  # as on an older kernel
        assert page_map.private() == scanned
        assert not page_map.is_tracked()
        monkeypatch.setattr(pages, "_BATCH", 64)
        assert page_map.private() == scanned


def test_more_runs_than_one_answer_holds(
    written: tuple[RamMapping, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, numbers = written
    monkeypatch.setattr(pages, "_REGIONS", 7)
    with PageMap(where) as page_map:
        assert listed(page_map.private()) == numbers


def test_reading_many_runs(written: tuple[RamMapping, list[int]]) -> None:
    where, numbers = written
    runs = [(page, 1) for page in numbers]
    with reader.Buffer(bytes_of(runs) + PAGE) as buffer:
        assert buffer.read(where, runs, PAGE) == bytes_of(runs)
        with buffer.view(PAGE, bytes_of(runs)) as view:
            assert [view[at] for at in range(0, len(view), PAGE)] == [
                page % 251 + 1 for page in numbers
            ]


def test_a_process_that_is_gone_is_told() -> None:
    with subprocess.Popen(["true"]) as process:
        child = process.pid
    gone = RamMapping(pid=child, start=PAGE, size=PAGE)
    with pytest.raises(UnavailableError):
        PageMap(gone)
    with pytest.raises(UnavailableError):
        reader.check_readable(gone)
    with pytest.raises(UnavailableError):
        mapping.find(child, "/proc/self/fd/3", PAGE)


def test_tracking_is_believed_when_a_page_was_told() -> None:
    release = tuple(map(int, os.uname().release.split(".")[:2]))
    # A container's filter of system calls may refuse it, whatever the kernel.
    descriptor = ctypes.CDLL(None).syscall(tracking._SYS_USERFAULTFD, tracking._USER_MODE_ONLY)
    if descriptor >= 0:
        os.close(descriptor)
    assert tracking.has_write_tracking() or release < (6, 7) or descriptor < 0


def test_runs() -> None:
    assert joined([(0, 1), (1, 2), (4, 1), (5, 1)]) == [(0, 3), (4, 2)]
    assert pieces_of([(0, 3), (7, 4)], 2 * PAGE) == [
        [(0, 2)],
        [(2, 1), (7, 1)],
        [(8, 2)],
        [(10, 1)],
    ]
    assert pieces_of([], PAGE) == []


def machine(**changes: str) -> Machine:
    return Machine(
        machine_type=changes.get("machine_type", "pc-q35-7.2"),
        accelerator=changes.get("accelerator", "tcg"),
        cpu_model="max",
        qemu_version=changes.get("qemu_version", "7.2.22"),
        mac="52:54:00:12:34:56",
        firmware={"bios-256k.bin": Sha256("0")},
    )


def test_what_fits() -> None:
    here = fits.Offer(
        qemu_version="8.2.1",
        machine_types={"pc-q35-7.2", "pc-q35-8.2"},
        accelerator="tcg",
        cpu_features={"sse", "avx"},
    )
    assert fits.differences(machine(), {"sse"}, here) == []
    assert fits.differences(machine(qemu_version="8.2.9"), {"sse"}, here) == []
    (words,) = fits.differences(machine(qemu_version="10.0.0"), {"sse"}, here)
    assert "older 8.2.1" in words
    (words,) = fits.differences(machine(machine_type="pc-q35-9.0"), {"sse"}, here)
    assert "pc-q35-9.0" in words
    (words,) = fits.differences(machine(accelerator="kvm"), {"sse"}, here)
    assert "kvm" in words
    (words,) = fits.differences(machine(), {"sse", "avx512f"}, here)
    assert "avx512f" in words
