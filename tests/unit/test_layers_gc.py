"""What may go, against a naive model: in pure decisions, and in the catalog."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from stratabox.storage.catalog import gc, layers, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.model.errors import CorruptError
from stratabox.storage.model.ids import LayerId, mint
from stratabox.storage.model.states import LayerState
from support.records import Maker

Parents = dict[LayerId, LayerId | None]


@st.composite
def forests(draw: st.DrawFn, largest: int = 14) -> Parents:
    """Layers, each on one that is older, or on nothing."""
    count = draw(st.integers(0, largest))
    parents: Parents = {}
    for number in range(count):
        parent = draw(st.none() | st.integers(0, number - 1)) if number else None
        parents[LayerId(f"L{number}")] = None if parent is None else LayerId(f"L{parent}")
    return parents


def some_of(data: st.DataObject, parents: Parents) -> set[LayerId]:
    return data.draw(st.sets(st.sampled_from(sorted(parents)))) if parents else set()


def stands_on(layer: LayerId, parents: Parents) -> set[LayerId]:
    """The naive model: itself, and what its parent stands on."""
    parent = parents[layer]
    return {layer} | (stands_on(parent, parents) if parent else set())


def naive(roots: set[LayerId], parents: Parents) -> set[LayerId]:
    return {layer for root in roots for layer in stands_on(root, parents)}


@settings(deadline=None)
@given(parents=forests(), data=st.data())
def test_reachable_and_garbage(parents: Parents, data: st.DataObject) -> None:
    roots = some_of(data, parents)
    kept = gc.reachable(roots, parents)
    assert kept == naive(roots, parents)
    assert gc.garbage(roots, parents) == set(parents) - kept
    assert gc.reachable(kept, parents) == kept
    # What stays never stands on what goes.
    assert all(parents[layer] is None or parents[layer] in kept for layer in kept)


@settings(deadline=None)
@given(parents=forests(), data=st.data())
def test_freed_by_removing(parents: Parents, data: st.DataObject) -> None:
    """What the removal of a snapshot frees is the garbage after it less the garbage before it."""
    removed, roots = some_of(data, parents), some_of(data, parents)
    goes, stays = gc.freed_by_removing(removed, roots, parents)
    assert goes == gc.garbage(roots, parents) - gc.garbage(roots | removed, parents)
    assert goes | stays == naive(removed, parents)
    assert not goes & stays
    assert stays == naive(removed, parents) & naive(roots, parents)


def test_nothing_at_all() -> None:
    assert gc.reachable([], {}) == set()
    assert gc.garbage([], {}) == set()
    assert gc.freed_by_removing([], [], {}) == (set(), set())


def test_a_root_without_a_row_needs_only_itself() -> None:
    one = LayerId("lost")
    assert gc.reachable([one], {}) == {one}
    assert gc.garbage([one], {}) == set()


def test_a_long_chain() -> None:
    parents: Parents = {LayerId("0"): None}
    for number in range(1, 20_000):
        parents[LayerId(str(number))] = LayerId(str(number - 1))
    assert gc.reachable([LayerId("19999")], parents) == set(parents)
    assert gc.garbage([LayerId("9999")], parents) == {
        LayerId(str(n)) for n in range(10_000, 20_000)
    }


# -- in the catalog -------------------------------------------------------------------------------


def put(catalog: Catalog, maker: Maker, parents: Parents) -> dict[LayerId, LayerId]:
    """The same forest, empty of all else, under fresh ids: the old name of each and its id."""
    real = {name: LayerId(mint()) for name in parents}
    with catalog.transaction() as tx:
        for table in ("sandboxes", "snapshots"):
            tx.execute(f"DELETE FROM {table}")
        layers.drop(tx, [layer.id for layer in layers.everything(tx)])
        for name, parent in parents.items():
            layers.insert(tx, maker.layer(real[parent] if parent else None, id=real[name]))
    return real


@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(forest=forests(), data=st.data())
def test_garbage_is_dropped_in_any_order_and_survivors_keep_their_chains(
    catalog: Catalog, maker: Maker, forest: Parents, data: st.DataObject
) -> None:
    # All is drawn from the forest's own names: fresh ids would make every example another one.
    drawn = some_of(data, forest), some_of(data, forest)
    order = data.draw(st.permutations(sorted(forest)))
    real = put(catalog, maker, forest)
    parents = {real[name]: real[parent] if parent else None for name, parent in forest.items()}
    by_sandbox, by_snapshot = ({real[name] for name in names} for names in drawn)
    with catalog.transaction() as tx:
        for layer in by_sandbox:
            sandboxes.insert(tx, maker.sandbox(layer))
        for layer in by_snapshot:
            snapshots.insert(tx, maker.snapshot(layer))
        roots = layers.referenced(tx)
        assert roots == by_sandbox | by_snapshot
        for layer in parents:
            chain = [one.id for one in layers.chain(tx, layer)]
            assert set(chain) == stands_on(layer, parents)
            assert all(parents[low] == high for low, high in pairwise(chain))
            users = len(layers.users(tx, layer))
            above = [one for one in parents if layer in stands_on(one, parents)]
            assert users == len(by_sandbox & set(above)) + len(by_snapshot & set(above))
        doomed = gc.garbage(roots, parents)
        layers.mark_garbage(tx, doomed)
    with catalog.transaction() as tx:
        assert doomed == {
            layer.id for layer in layers.everything(tx) if layer.state is LayerState.GARBAGE
        }
        layers.drop(tx, [real[name] for name in order if real[name] in doomed])
        assert {layer.id for layer in layers.everything(tx)} == naive(roots, parents)


@settings(
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(forest=forests(), data=st.data())
def test_what_others_stand_on_is_not_dropped(
    catalog: Catalog, maker: Maker, forest: Parents, data: st.DataObject
) -> None:
    edges = [(child, parent) for child, parent in forest.items() if parent]
    assume(edges)
    child, parent = data.draw(st.sampled_from(edges))
    chosen = (set(some_of(data, forest)) | {parent}) - {child}
    real = put(catalog, maker, forest)
    parents = {real[name]: real[parent] if parent else None for name, parent in forest.items()}
    doomed = {real[name] for name in chosen}
    with pytest.raises(CorruptError) as caught, catalog.transaction() as tx:
        layers.drop(tx, doomed)
    assert caught.value.reason == "CATALOG_CORRUPT"
    with catalog.transaction() as tx:
        assert {layer.id for layer in layers.everything(tx)} == set(parents)


def test_dropping_what_is_gone_is_nothing(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        layers.drop(tx, [LayerId(mint())])
        layers.drop(tx, [])
