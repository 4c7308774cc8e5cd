"""The figures of admission: who counts, who does not, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor import cgroup, host_room
from stratabox.daemon.hypervisor.host_room import HostRoom
from stratabox.daemon.lifecycle.account import OVERHEAD, Account, Limits, Resource, Share, Verdict
from stratabox.daemon.lifecycle.admission import Admission, AdmissionError, refusal
from stratabox.storage.catalog import images, sandboxes
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.model.ids import SandboxId, mint
from stratabox.storage.model.records import MIB
from stratabox.storage.model.states import SandboxState
from support.records import Maker as Records

records = Records()
STATES = {
    SandboxState.CREATING: 1,
    SandboxState.RUNNING: 2,
    SandboxState.PAUSED: 4,
    SandboxState.TERMINATING: 8,
    SandboxState.STOPPED: 1000,
    SandboxState.FAILED: 1000,
    SandboxState.TERMINATED: 1000,
}


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """One sandbox in each state."""
    with closing(Catalog(tmp_path / "catalog.db")) as catalog:
        with catalog.transaction() as tx:
            image = images.insert(tx, records.image())
            for number, (state, memory) in enumerate(STATES.items()):
                made = records.sandbox(
                    image=image.id, state=state, memory=memory, uid=number + 70000
                )
                sandboxes.insert(tx, made)
        yield catalog


def limited(memory: int) -> Admission:
    return Admission(Limits(memory=memory))


def test_what_has_a_process_or_is_about_to_counts(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        assert sum(sandboxes.memory_in_use(tx).values()) == 15
        assert sandboxes.cpus_in_use(tx).keys() == sandboxes.memory_in_use(tx).keys()
        limited(25).check(tx, SandboxId(mint()), 10, 1)
        with pytest.raises(AdmissionError) as refused:
            limited(25).check(tx, SandboxId(mint()), 11, 1)
        limited(0).check(tx, SandboxId(mint()), 1 << 20, 1)
        with pytest.raises(AdmissionError) as full:
            Admission(Limits(sandboxes=4)).check(tx, SandboxId(mint()), 1, 1)
    assert refused.value.reason == "ADMISSION_REFUSED"
    assert refused.value.metadata == {
        "resource": "memory",
        "limit": "25", "in_use": "15", "wanted": "11", "missing": "1", "sandboxes": "4",
    }  # fmt: skip
    assert full.value.metadata["resource"] == "sandboxes"


def test_its_own_share_is_not_counted_twice(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        (running,) = (s for s in sandboxes.everything(tx) if s.state is SandboxState.RUNNING)
        limited(15).check(tx, running.id, running.memory, running.cpus)


async def test_room_is_held_until_the_record_says_it(catalog: Catalog) -> None:
    admission = limited(20)

    async def read(look: Callable[[Transaction], None]) -> None:
        with catalog.transaction() as tx:
            look(tx)

    first, second = SandboxId(mint()), SandboxId(mint())
    async with admission.room(read, first, 5, 1):
        async with admission.room(read, first, 5, 1):  # within itself it is nothing
            pass
        with pytest.raises(AdmissionError):
            async with admission.room(read, second, 1, 1):
                pass
    async with admission.room(read, second, 5, 1):
        with pytest.raises(AdmissionError):
            async with admission.room(read, first, 1, 1):
                pass


def test_a_refusal_says_what_to_do() -> None:
    def text(resource: Resource, *, in_use: int = 90, wanted: int = 20) -> str:
        verdict = Verdict(resource=resource, limit=100, in_use=in_use, wanted=wanted, sandboxes=3)
        return str(refusal(verdict))

    memory = text(Resource.MEMORY)
    assert "20 MiB" in memory
    assert "3 sandboxes have 90 of the 100 MiB" in memory
    assert "10 MiB are missing" in memory
    assert "more than all guests may have" in text(Resource.MEMORY, in_use=0, wanted=200)
    for resource in Resource:
        assert "admission." in text(resource)


def room(*, available: int = 0, swap: int = 0, group: int | None = None) -> HostRoom:
    return HostRoom(total=0, available=available, swap=swap, group=group, cpus=2)


def test_guests_grow_until_all_of_their_ram_is_their_own() -> None:
    clone = Share(memory=1000, cpus=1).written(200)
    assert clone.growth == 1000 + OVERHEAD - 200
    assert clone.written(5000).growth == 0  # QEMU's own memory never makes room for another guest
    account = Account(
        limits=Limits(memory_overcommit=2, memory_reserve=100),
        room=room(available=1100),
        shares=(clone,),
    )
    assert account.growth_limit == 2000
    free = 2000 - clone.growth
    assert account.refuses(Share(memory=free - OVERHEAD, cpus=1)) is None
    verdict = account.refuses(Share(memory=free - OVERHEAD + 1, cpus=1))
    assert verdict is not None
    assert (verdict.resource, verdict.missing) == (Resource.HOST_MEMORY, 1)


def test_what_there_is_is_the_least_of_host_and_group() -> None:
    assert room(available=500, swap=100).memory(swap=False) == 500
    assert room(available=500, swap=100).memory(swap=True) == 600
    assert room(available=500, swap=100, group=50).memory(swap=True) == 50


def test_cpus_are_a_factor_of_the_hosts() -> None:
    account = Account(
        limits=Limits(cpu_overcommit=1.5), room=room(), shares=(Share(memory=1, cpus=2),)
    )
    assert account.refuses(Share(memory=1, cpus=1)) is None
    verdict = account.refuses(Share(memory=1, cpus=2))
    assert verdict is not None
    assert verdict.resource is Resource.CPUS


def test_this_hosts_memory_is_read() -> None:
    found = host_room.look()
    assert 0 < found.available <= found.total
    assert found.cpus > 0


@pytest.mark.parametrize(
    ("kind", "names", "point"),
    [
        ("cgroup2", ("memory.max", "memory.current", "inactive_file"), "0::"),
        (
            "cgroup",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            "4:cpu,memory:",
        ),
    ],
)
def test_the_tightest_group_above_counts(
    tmp_path: Path, kind: str, names: tuple[str, str, str], point: str
) -> None:
    mounted = tmp_path / "mounted"
    inner = mounted / "slice" / "unit"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup").write_text(f"{point}/here/slice/unit\n9:name=systemd:/elsewhere\n")
    (tmp_path / "mountinfo").write_text(
        f"30 20 0:26 / /other rw - tmpfs tmpfs rw\n"
        f"31 20 0:27 /here {mounted} rw,nosuid shared:9 - {kind} cgroup rw,memory\n"
    )

    def group(folder: Path, limit: str, used: int, droppable: int) -> None:
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {droppable}\n")

    group(inner, str(1000 * MIB), 100 * MIB, 0)
    group(inner.parent, str(500 * MIB), 480 * MIB, 30 * MIB)
    assert cgroup.memory_room(tmp_path) == 50 * MIB
    group(inner.parent, str(0x7FFFFFFFFFFFF000) if kind == "cgroup" else "max", 480, 0)
    assert cgroup.memory_room(tmp_path) == 900 * MIB
    (tmp_path / "mountinfo").write_text("")
    assert cgroup.memory_room(tmp_path) is None
