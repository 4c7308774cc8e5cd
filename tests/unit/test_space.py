"""What records take: own is exactly what a sweep frees after a delete, against a naive model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratabox.storage.catalog import (
    garbage,
    gc,
    images,
    layers,
    rams,
    sandboxes,
    snapshots,
    space,
)
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.catalog.known_chains import KnownChains
from stratabox.storage.files import usage
from stratabox.storage.files.store import NewOverlay, Store
from stratabox.storage.model.ids import LayerId, Sha256, mint
from stratabox.storage.model.records import GIB, Sandbox, SavedRam, Snapshot
from stratabox.storage.model.states import ImageState, LayerState, SandboxState
from support.records import Maker, scratch

example = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ACTIVE = 5000
"""Bytes of each active layer here."""


@st.composite
def families(draw: st.DrawFn) -> tuple[list[int | None], list[list[int]], list[list[int]]]:
    """A forest of layers, and which of them each snapshot and each sandbox names."""
    count = draw(st.integers(1, 12))
    parents: list[int | None] = [None]
    parents += [draw(st.none() | st.integers(0, number - 1)) for number in range(1, count)]
    some = st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True)
    return parents, draw(st.lists(some, max_size=5)), draw(st.lists(some, max_size=2))


def put(
    tx: Transaction,
    maker: Maker,
    family: tuple[list[int | None], list[list[int]], list[list[int]]],
) -> tuple[list[LayerId], list[Snapshot], list[Sandbox]]:
    parents, of_snapshots, of_sandboxes = family
    made: list[LayerId] = []
    taken = {layer for those in of_sandboxes for layer in those}
    for number, parent in enumerate(parents):
        layer = maker.layer(
            None if parent is None else made[parent],
            state=LayerState.ACTIVE if number in taken else LayerState.SEALED,
            bytes=0 if number in taken else 1 << number,
        )
        layers.insert(tx, layer)
        made.append(layer.id)
    shots = [
        snapshots.insert(tx, maker.snapshot(*(made[each] for each in those)))
        for those in of_snapshots
    ]
    boxes, used = [], set[int]()
    for those in of_sandboxes:
        free = [each for each in those if each not in used]
        used |= set(free)
        boxes.append(sandboxes.insert(tx, maker.sandbox(*(made[each] for each in free))))
    return made, shots, boxes


def bytes_of(tx: Transaction) -> dict[LayerId, int]:
    return {
        layer.id: ACTIVE if layer.state is LayerState.ACTIVE else layer.bytes
        for layer in layers.everything(tx)
    }


def tops(record: Snapshot | Sandbox) -> list[LayerId]:
    return [disk.layer for disk in record.disks]


@example
@given(family=families())
def test_space_against_the_whole_graph(
    catalog: Catalog,
    maker: Maker,
    family: tuple[list[int | None], list[list[int]], list[list[int]]],
) -> None:
    with scratch(catalog) as tx:
        _, shots, boxes = put(tx, maker, family)
        # As after a sweep: what nobody needs is no child of anything.
        layers.drop(tx, garbage.take(tx))
        parents = {layer.id: layer.parent for layer in layers.everything(tx)}
        sizes = bytes_of(tx)
        everybody: Sequence[Snapshot | Sandbox] = (*shots, *boxes)
        spaces = space.of_snapshots(tx, shots, lambda layer: ACTIVE)
        spaces += space.of_sandboxes(tx, boxes, lambda layer: ACTIVE)
        found = {str(one.id): takes for one, takes in zip(everybody, spaces, strict=True)}
        for one in everybody:
            others = [layer for other in everybody if other.id != one.id for layer in tops(other)]
            goes, stays = gc.freed_by_removing(tops(one), others, parents)
            takes = found[one.id]
            assert takes.own == sum(sizes[layer] for layer in goes), one
            assert takes.shared == sum(sizes[layer] for layer in stays), one
            assert takes.logical == takes.own + takes.shared
            alone = space.goes_with(tx, space.Holding(id=one.id, layers=tuple(tops(one))))
            assert set(alone.layers) == goes


@example
@given(family=families(), data=st.data())
def test_a_sweep_finds_what_the_whole_graph_says(
    catalog: Catalog,
    maker: Maker,
    family: tuple[list[int | None], list[list[int]], list[list[int]]],
    data: st.DataObject,
) -> None:
    with scratch(catalog) as tx:
        _, shots, boxes = put(tx, maker, family)
        for order in data.draw(st.permutations(range(len(shots) + len(boxes)))):
            every = {layer.id: layer.parent for layer in layers.everything(tx)}
            expected = gc.garbage(layers.referenced(tx), every)
            doomed = garbage.take(tx)
            assert set(doomed) == expected
            for number, layer in enumerate(doomed):
                assert every[layer] not in doomed[:number], "a parent before its child"
            layers.drop(tx, doomed)
            if order < len(shots):
                snapshots.delete(tx, shots[order].id)
            else:
                sandboxes.delete(tx, boxes[order - len(shots)].id)
        layers.drop(tx, garbage.take(tx))
        assert layers.everything(tx) == []


def test_what_was_missed_is_found_by_looking_at_all(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        chain = maker.chain(tx, 3)
        tx.execute("DELETE FROM suspects")
        assert garbage.take(tx) == []
        garbage.suspect_all(tx)
        assert garbage.take(tx) == chain[::-1]
        assert tx.rows("SELECT * FROM suspects") == [], "what was looked at is not looked at again"


def test_a_tombstone_comes_again_until_its_file_is_gone(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        (layer,) = maker.chain(tx, 1)
        for _ in range(2):
            assert garbage.take(tx) == [layer]
            layers.mark_garbage(tx, [layer])


def test_what_a_job_works_on_stays_until_it_has_ended(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        base, layer, target = (maker.chain(tx, 1)[0] for _ in range(3))
        tx.insert(
            "jobs",
            {
                "id": mint(), "kind": "merge", "state": "running", "layer": layer, "base": base,
                "target": target, "done_bytes": 0, "total_bytes": 0, "reason": "",
                "created_at": "t",
            },
        )  # fmt: skip
        assert garbage.take(tx) == []
        tx.execute("UPDATE jobs SET state = 'done'")
        assert set(garbage.take(tx)) == {base, layer, target}


# -- saved memory ---------------------------------------------------------------------------------


def ram(parent: str | None, taken: int) -> SavedRam:
    return SavedRam(
        parent=parent,
        own_bytes=taken,
        bytes=taken,
        state_sha256=Sha256("0" * 64),
        tracking="none",
        pause=timedelta(0),
        cpu_features=(),
    )


def remember(tx: Transaction, maker: Maker, parent: str | None, taken: int) -> Snapshot:
    made = snapshots.insert(tx, maker.snapshot())
    rams.insert(tx, made.id, ram(parent, taken))
    return snapshots.get(tx, made.id)


def own(tx: Transaction, *records: Snapshot) -> list[int]:
    return [each.own for each in space.of_snapshots(tx, records, lambda layer: ACTIVE)]


def test_memory_is_told_with_all_that_it_stands_on(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        first = remember(tx, maker, None, 100)
        second = remember(tx, maker, first.id, 20)
        third = remember(tx, maker, second.id, 3)
        takes = space.of_snapshots(tx, [first, second, third], lambda layer: ACTIVE)
        assert [(each.logical, each.own, each.shared) for each in takes] == [
            (100, 0, 100),
            (120, 0, 120),
            (123, 3, 120),
        ]
        # Without its snapshot a file stays for the next one, and goes with that.
        snapshots.delete(tx, second.id)
        assert rams.garbage(tx) == []
        assert own(tx, first, third) == [0, 23]
        snapshots.delete(tx, third.id)
        assert rams.garbage(tx) == [third.id, second.id]


def test_memory_that_a_guest_goes_on_from_is_its_own_once_its_snapshot_is_gone(
    catalog: Catalog, maker: Maker
) -> None:
    with catalog.transaction() as tx:
        origin = remember(tx, maker, None, 100)
        state = {"state": SandboxState.RUNNING, "ram_origin": origin.id}
        box = sandboxes.insert(tx, maker.sandbox(**state))

        def told() -> tuple[int, int]:
            (takes,) = space.of_sandboxes(tx, [box], lambda layer: ACTIVE)
            return takes.logical, takes.own

        assert told() == (100, 0)
        assert own(tx, origin) == [0]
        snapshots.delete(tx, origin.id)
        assert told() == (100, 100)
        assert rams.garbage(tx) == []
        sandboxes.delete(tx, box.id)
        assert rams.garbage(tx) == [origin.id]


def test_merges_are_found_among_what_is_ownerless(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        chain = [remember(tx, maker, None, 1)]
        for _ in range(4):
            chain.append(remember(tx, maker, chain[-1].id, 1))
        assert rams.merges(tx) == []
        for gone in (1, 2):
            snapshots.delete(tx, chain[gone].id)
        assert rams.merges(tx) == [rams.Merge(child=chain[3].id, until=chain[0].id)]


# -- what counts, and what there is ---------------------------------------------------------------


def test_the_sum_follows_all_that_comes_and_goes(catalog: Catalog, maker: Maker) -> None:
    def total() -> int:
        (row,) = tx.rows("SELECT bytes FROM store")
        return int(row["bytes"])

    with catalog.transaction() as tx:
        layer = maker.layer(state=LayerState.SEALED, bytes=1000)
        layers.insert(tx, layer)
        (active,) = maker.chain(tx, 1)
        assert total() == 1000
        layers.seal(tx, {active: 500})
        assert total() == 1500
        shot = remember(tx, maker, None, 70)
        rams.rebase(tx, shot.id, None, own_bytes=1, taken=90)
        assert total() == 1590
        rams.drop(tx, shot.id)
        layers.drop(tx, [active, layer.id])
        assert total() == 0


def test_survey_and_count(store: Store, catalog: Catalog, maker: Maker) -> None:
    base, mine, active, nobodys = (LayerId(mint()) for _ in range(4))
    store.make_overlays(
        NewOverlay(layer, parent, GIB)
        for layer, parent in ((base, None), (mine, base), (active, mine), (nobodys, base))
    )
    sizes = {layer: store.bytes_of([layer]) for layer in (base, mine, active, nobodys)}
    with catalog.transaction() as tx:
        for layer, parent in ((base, None), (mine, base), (active, mine)):
            state = LayerState.ACTIVE if layer == active else LayerState.SEALED
            taken = 0 if layer == active else sizes[layer]
            layers.insert(tx, maker.layer(parent, id=layer, state=state, bytes=taken))
        images.insert(tx, maker.image(state=ImageState.READY, layer=base))
        snapshots.insert(tx, maker.snapshot(mine))
        sandboxes.insert(tx, maker.sandbox(active))
    (store.layout.blobs / "kernel").write_bytes(b"k" * 9000)
    (store.layout.root / "what").write_bytes(b"?")
    with catalog.looking() as tx:
        parts = usage.survey(store.layout, space.kinds(tx))
    told = {name: part.bytes for name, part in parts.items()}
    assert told["images"] == sizes[base]
    assert told["snapshots"] == sizes[mine]
    assert told["sandboxes"] == sizes[active]
    assert told["garbage"] == sizes[nobodys]
    assert told["boot_files"] >= 9000
    assert told["other"] > 0
    du = sum(path.lstat().st_blocks * 512 for path in [store.layout.root, *all_below(store)])
    assert sum(told.values()) == du
    with catalog.transaction() as tx:
        counted = usage.counted(tx, store.layout)
    expected = sizes[base] + sizes[mine] + sizes[active] + told["boot_files"] + told["catalog"]
    assert counted == expected


def all_below(store: Store) -> list[Path]:
    return list(store.layout.root.rglob("*"))


def test_chains_are_remembered_until_one_is_put_in_anothers_place(
    catalog: Catalog, maker: Maker
) -> None:
    known = KnownChains()
    with catalog.transaction() as tx:
        layers_ = [maker.layer(state=LayerState.SEALED, bytes=1000)]
        for size in (100, 10, 1):
            layers_.append(maker.layer(layers_[-1].id, state=LayerState.SEALED, bytes=size))
        for layer in layers_:
            layers.insert(tx, layer)
        base, middle, _, top = (layer.id for layer in layers_)
        shot = snapshots.insert(tx, maker.snapshot(top))

        def logical() -> int:
            (takes,) = space.of_snapshots(tx, [shot], lambda layer: ACTIVE, known)
            return takes.logical

        assert logical() == 1111
        # Behind the triggers' back, which shows that it is remembered at all.
        tx.execute("UPDATE layers SET state = 'active', bytes = 7 WHERE id = ?", (middle,))
        tx.execute("UPDATE store SET chains = chains - 1")
        assert logical() == 1111
        tx.execute("UPDATE layers SET state = 'sealed', bytes = 100 WHERE id = ?", (middle,))
        tx.execute("UPDATE layers SET parent = ? WHERE id = ?", (middle, top))
        assert logical() == 1101
        tx.execute("UPDATE layers SET bytes = 5 WHERE id = ?", (base,))
        assert logical() == 106
        # A new layer on a remembered chain.
        young = maker.layer(top, state=LayerState.SEALED, bytes=20)
        layers.insert(tx, young)
        (takes,) = space.of_snapshots(tx, [maker.snapshot(young.id)], lambda layer: 0, known)
        assert takes.logical == 126


def test_no_more_is_remembered_than_may_be(catalog: Catalog, maker: Maker) -> None:
    known = KnownChains(limit=3)
    with catalog.transaction() as tx:
        chain = maker.chain(tx, 10)
        tx.execute("UPDATE layers SET state = 'sealed', bytes = 1")
        for _ in range(3):
            assert sorted(known.below(tx, [chain[-1]])) == sorted(chain)
            assert len(known._sealed) <= 3
