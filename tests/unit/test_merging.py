"""RAM files leave chains: which ones may, and that killed at any step the chain is whole."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratabox.storage.catalog import operations, rams, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.catalog.rams import Merge, find_merges, in_order, needed
from stratabox.storage.files import merging
from stratabox.storage.files.checking import Read, Wrong, examine, finding
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.memory.chain import OpenChain
from stratabox.storage.files.memory.format import PAGE, read_header
from stratabox.storage.files.memory.sealed import assemble
from stratabox.storage.files.memory.writer import write
from stratabox.storage.files.stock import Kind as FileKind
from stratabox.storage.files.stock import take_stock
from stratabox.storage.files.store import Store
from stratabox.storage.model.errors import CorruptError, NoSpaceError
from stratabox.storage.model.ids import SandboxId, Sha256, SnapshotId, mint
from stratabox.storage.model.records import MIB, SavedRam
from support.records import Maker

RAM = 128 * MIB

# Forests: each file's parent is an earlier one, or nobody.
forests = st.lists(st.integers(-1, 30), max_size=24).map(
    lambda picks: {
        str(number): str(pick % number) if number and pick >= 0 else None
        for number, pick in enumerate(picks)
    }
)


@given(parents=forests, data=st.data())
def test_what_may_leave_a_chain(parents: dict[str, str | None], data: st.DataObject) -> None:
    roots = data.draw(st.sets(st.sampled_from(sorted(parents)))) if parents else set()
    kept = needed(parents, roots)
    merges = {merge.child: merge.until for merge in find_merges(parents, roots)}
    gone: set[str] = set()
    for child, until in merges.items():
        ram = parents[child]
        assert ram != until
        while ram != until:
            assert ram is not None
            assert ram not in roots
            assert ram not in gone
            gone.add(ram)
            ram = parents[ram]
    after = {ram: merges.get(ram, parents[ram]) for ram in kept - gone}
    # Everybody's ancestors are what they were, but for those that are nobody's.
    for ram in after:
        assert ancestors(ram, after) == [each for each in ancestors(ram, parents) if each in after]
    # And that was all: what is left is somebody's, or two or more stand on it.
    children = Counter(after.values())
    assert all(ram in roots or children[ram] > 1 for ram in after)
    assert find_merges(after, roots) == []


def ancestors(ram: str, parents: dict[str, str | None]) -> list[str]:
    found = []
    parent = parents[ram]
    while parent is not None:
        found.append(parent)
        parent = parents[parent]
    return found


@given(parents=forests, data=st.data())
def test_garbage_goes_children_first(parents: dict[str, str | None], data: st.DataObject) -> None:
    some = data.draw(st.sets(st.sampled_from(sorted(parents)))) if parents else set()
    ordered = in_order(some, parents)
    assert sorted(ordered) == sorted(some)
    for position, ram in enumerate(ordered):
        assert parents[ram] not in ordered[:position]


def test_a_chain_may_be_longer_than_the_stack_is_deep() -> None:
    parents = {str(number): str(number - 1) if number else None for number in range(5000)}
    assert in_order(set(parents), parents)[0] == "4999"
    assert find_merges(parents, {"4999"}) == [Merge(child="4999", until=None)]


@dataclass
class Chain:
    """Saved memory in files and rows, and what each must hold."""

    store: Store
    catalog: Catalog
    maker: Maker
    ids: list[str] = field(default_factory=list)
    pages: dict[str, bytes] = field(default_factory=dict)

    def grow(self, first: int, values: bytes, parent: str | None = None) -> str:
        """A snapshot on the last one, or another: pages from `first` on."""
        snapshot = self.maker.snapshot()
        parent = parent or (self.ids[-1] if self.ids else None)
        data = memoryview(b"".join(bytes([value]) * PAGE for value in values))
        file = write(
            self.store.layout.ram_file(snapshot.id),
            [(first * PAGE, data)],
            id=snapshot.id,
            parent=parent,
            ram_bytes=RAM,
        )
        self.store.layout.state_file(snapshot.id).write_bytes(b"state")
        before = bytearray(self.pages[parent] if parent else bytes(16))
        before[first : first + len(values)] = values
        self.pages[snapshot.id] = bytes(before)
        self.ids.append(snapshot.id)
        with self.catalog.transaction() as tx:
            snapshots.insert(tx, snapshot)
            rams.insert(
                tx,
                snapshot.id,
                SavedRam(
                    parent=parent,
                    own_bytes=file.own_bytes,
                    state_sha256=Sha256("0" * 64),
                    tracking="written",
                    pause=timedelta(),
                    cpu_features=(),
                ),
            )
        return snapshot.id

    def delete(self, *ids: str) -> None:
        """Snapshots go, and what nobody stands on."""
        with self.catalog.transaction() as tx:
            for id in ids:
                snapshots.delete(tx, SnapshotId(id))
        self.store.sweep(self.catalog)

    def merges(self) -> list[Merge]:
        with self.catalog.transaction() as tx:
            return rams.merges(tx)

    def merge(self) -> bool:
        """Do the only one that there is."""
        (wanted,) = self.merges()
        written = merging.write(self.store.layout, wanted, lambda: True)
        assert written is not None
        done = merging.swap(self.store.layout, self.catalog, written)
        self.store.sweep(self.catalog)
        return done

    def start_again(self) -> None:
        """What a daemon does with the files when it starts."""
        self.store.sweep(self.catalog)
        with self.catalog.transaction() as tx:
            tx.next_generation()
        self.store.sweep_strays(self.catalog)

    def check(self, *ids: str) -> None:
        """These are what they were, and nothing else is there."""
        for id in ids:
            with OpenChain(id, self.store.layout.ram_file, RAM) as chain:
                descriptor = assemble(chain, verify=True)
            try:
                assert os.pread(descriptor, 16 * PAGE, 0)[::PAGE] == self.pages[id]
            finally:
                os.close(descriptor)
        with self.catalog.transaction() as tx:
            rows = rams.everything(tx)
            assert {path.stem for path in self.store.layout.ram.iterdir()} == set(rows)
        for id, parent in rows.items():
            assert read_header(self.store.layout.ram_file(id)).parent == parent

    def wrong(self) -> list[Wrong]:
        """What a check finds wrong with RAM files."""
        with self.catalog.transaction() as tx:
            stock = take_stock(tx, self.store.layout)
        found = [
            examine(item, stock, self.store.layout, Read(), lambda: True)
            for item in stock.items
            if item.kind is FileKind.RAM
        ]
        return [each for each in found if each is not None]

    def own_bytes(self, id: str) -> int:
        with self.catalog.transaction() as tx:
            ram = rams.find(tx, id)
        assert ram is not None
        return ram.own_bytes


@pytest.fixture
def chain(store: Store, catalog: Catalog, maker: Maker) -> Chain:
    return Chain(store, catalog, maker)


def test_deleted_ones_go_into_the_one_above(chain: Chain) -> None:
    first, *middle, last = (chain.grow(number, bytes([number + 1] * 3)) for number in range(5))
    assert chain.merges() == []
    chain.delete(*middle)
    chain.check(first, last)
    assert chain.merges() == [Merge(child=last, until=first)]
    assert chain.merge()
    assert chain.merges() == []
    chain.check(first, last)
    assert set(chain.ids) - set(middle) == {path.stem for path in chain.store.layout.ram.iterdir()}
    assert chain.own_bytes(last) == read_header(chain.store.layout.ram_file(last)).own_bytes
    chain.delete(first)
    assert chain.merge()
    chain.check(last)
    assert read_header(chain.store.layout.ram_file(last)).parent is None


def test_one_that_two_stand_on_stays_until_one_does(chain: Chain) -> None:
    base = chain.grow(0, b"\1\2\3")
    one = chain.grow(1, b"\7", base)
    two = chain.grow(2, b"\x08", base)
    chain.delete(base)
    assert chain.merges() == []
    chain.check(one, two)
    chain.delete(one)
    assert chain.merges() == [Merge(child=two, until=None)]
    assert chain.merge()
    chain.check(two)


@pytest.mark.parametrize("column", ["ram_origin", "ram_since", "ram_parked"])
def test_one_that_a_process_stands_on_stays(chain: Chain, column: str) -> None:
    first, second, third = (chain.grow(number, b"\1\2") for number in range(3))
    with chain.catalog.transaction() as tx:
        sandboxes.insert(tx, chain.maker.sandbox(**{column: second}))
    chain.delete(second)
    assert chain.merges() == []
    chain.delete(third)
    chain.check(first, second)
    chain.delete(first)
    assert chain.merges() == [Merge(child=second, until=None)]
    assert chain.merge()
    chain.check(second)


def test_one_that_a_save_is_about_to_stand_on_stays(chain: Chain) -> None:
    """While it is under way, nothing else says that it will be needed."""
    first = chain.grow(0, b"\1\2")
    second = chain.grow(1, b"\3")
    box = SandboxId(mint())
    operation = Operation(kind=Kind.SNAPSHOT, sandbox=box, payload={"disks": []})
    with chain.catalog.transaction() as tx:
        operations.begin(tx, operation)
        rams.pin(tx, box, second)
        rams.pin(tx, SandboxId(mint()), None)  # another's
        (kept,) = operations.unfinished(tx)
        assert kept.payload == {"disks": [], "ram_base": second}
    chain.delete(first, second)
    chain.check(second)
    assert chain.merges() == [Merge(child=second, until=None)]
    with chain.catalog.transaction() as tx:
        operations.end(tx, operation.id)
    chain.delete()
    chain.check()


@pytest.mark.parametrize("point", ["merge.written", "merge.renamed", "merge.recorded"])
def test_a_merge_that_ended_at_any_step_is_taken_up_again(
    chain: Chain, arm: Callable[[str], None], point: str
) -> None:
    first, second, third = (chain.grow(number, b"\1\2\3") for number in range(3))
    chain.delete(second)
    arm(f"{point}=error")
    with pytest.raises(OSError, match="failpoint"):
        chain.merge()
    arm("")
    for id in (first, third):
        with OpenChain(id, chain.store.layout.ram_file, RAM) as opened:
            os.close(assemble(opened, verify=True))
    assert chain.wrong() == []
    chain.start_again()
    if point != "merge.recorded":
        assert chain.merges() == [Merge(child=third, until=first)]
        assert chain.merge()
    chain.check(first, third)


def test_a_merge_that_ended_half_way_goes_on_though_more_was_deleted(
    chain: Chain, arm: Callable[[str], None]
) -> None:
    """Its file is in place but its row is not; then the next ones below are deleted too."""
    first, second, third, fourth = (chain.grow(number, b"\1\2\3") for number in range(4))
    chain.delete(third)
    arm("merge.renamed=error")
    with pytest.raises(OSError, match="failpoint"):
        chain.merge()
    arm("")
    chain.delete(second)
    assert chain.merges() == [Merge(child=fourth, until=first)]
    assert chain.merge()
    chain.check(first, fourth)


def test_a_child_that_is_deleted_meanwhile_leaves_nothing(chain: Chain) -> None:
    first, second, third = (chain.grow(number, b"\1\2\3") for number in range(3))
    chain.delete(second)
    (wanted,) = chain.merges()
    written = merging.write(chain.store.layout, wanted, lambda: True)
    assert written is not None
    chain.delete(third)
    assert not merging.swap(chain.store.layout, chain.catalog, written)
    chain.check(first)


def test_a_merge_that_is_not_to_go_on_leaves_nothing(chain: Chain) -> None:
    first, second, third = (chain.grow(number, b"\1\2\3") for number in range(3))
    chain.delete(second)
    (wanted,) = chain.merges()
    assert merging.write(chain.store.layout, wanted, lambda: False) is None
    chain.check(first, second, third)


def test_damage_is_not_handed_on(chain: Chain) -> None:
    _, second, third = (chain.grow(number, b"\1\2\3") for number in range(3))
    chain.delete(second)
    path = chain.store.layout.ram_file(second)
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[PAGE + 3] ^= 1
    path.write_bytes(content)
    (wanted,) = chain.merges()
    with pytest.raises(CorruptError, match=second):
        merging.write(chain.store.layout, wanted, lambda: True)
    assert not chain.store.layout.merging(third).exists()


def test_damage_is_told_of_whose_memory_it_is(chain: Chain) -> None:
    """A snapshot's, a parked sandbox's, or of one that is only stood on."""
    stood_on, parked, snapshot = (chain.grow(number, b"\1\2") for number in range(3))
    box = chain.maker.sandbox(ram_parked=parked)
    with chain.catalog.transaction() as tx:
        sandboxes.insert(tx, box)
    chain.grow(5, b"\4", stood_on)
    chain.delete(stood_on, parked)
    for path in (chain.store.layout.ram_file(id) for id in (stood_on, parked, snapshot)):
        path.chmod(0o600)
        path.write_bytes(b"\0")
    with chain.catalog.transaction() as tx:
        stock = take_stock(tx, chain.store.layout)
    told = {}
    for item in stock.items:
        if item.kind is FileKind.RAM:
            wrong = examine(item, stock, chain.store.layout, Read(), lambda: True)
            if wrong is not None:
                found = finding(item, wrong, stock)
                told[item.id] = (found.reason, found.kind, found.subject)
    assert told == {
        stood_on: ("RAM_CORRUPT", "file", f"{stood_on}.ram"),
        parked: ("RAM_CORRUPT", "sandbox", box.id),
        snapshot: ("RAM_CORRUPT", "snapshot", snapshot),
    }


def test_a_full_disk_leaves_the_chain_as_it_was(
    small_disk: Callable[[int], Path], maker: Maker
) -> None:
    store = Store(Layout(small_disk(1024) / "state"))
    catalog = Catalog(store.layout.catalog)
    try:
        chain = Chain(store, catalog, maker)
        first, second, third = (chain.grow(number, b"\1\2\3") for number in range(3))
        chain.delete(second)
        with pytest.raises(OSError, match="No space left"):
            (store.layout.work / "filler").write_bytes(bytes(1 << 20))
        (wanted,) = chain.merges()
        with pytest.raises(NoSpaceError):
            merging.write(store.layout, wanted, lambda: True)
        (store.layout.work / "filler").unlink()
        chain.check(first, third)
        assert chain.merge()
        chain.check(first, third)
    finally:
        catalog.close()
