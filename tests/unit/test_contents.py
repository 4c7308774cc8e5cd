"""Layers that are known again by what they read as, whatever is merged below them."""

from __future__ import annotations

from datetime import UTC, datetime

from stratabox.storage.catalog import contents, layers, snapshots
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.model.ids import LayerId, Sha256, mint
from stratabox.storage.model.records import Layer
from stratabox.storage.model.states import LayerState
from support.records import Maker

SIZE = 1 << 30
A, B, C = (Sha256(letter * 64) for letter in "abc")


def layer(
    tx: Transaction, parent: LayerId | None = None, state: LayerState = LayerState.SEALED
) -> LayerId:
    id = LayerId(mint())
    layers.insert(
        tx, Layer(id=id, parent=parent, state=state, size=SIZE, created_at=datetime.now(UTC))
    )
    return id


def test_a_name_is_of_all_that_is_read() -> None:
    names = {
        contents.name_of(A, None), contents.name_of(B, None), contents.name_of(A, B),
        contents.name_of(B, A), contents.name_of(A, contents.name_of(B, None)),
    }  # fmt: skip
    assert len(names) == 5
    assert contents.name_of(A, B) == contents.name_of(A, B)


def test_sealed_layers_are_found_by_it(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        image = layer(tx)
        top = layer(tx, image)
        assert contents.reading_as(tx, A, SIZE) is None
        contents.note(tx, image, A, None)
        below = contents.name_of(A, None)
        contents.note(tx, top, B, below)
        name = contents.name_of(B, below)
        assert contents.reading_as(tx, name, SIZE) is None, "nobody has it: it may go"
        snapshots.insert(tx, Maker().snapshot(image))
        snapshots.insert(tx, Maker().snapshot(top))
        assert contents.reading_as(tx, below, SIZE) == image
        assert contents.reading_as(tx, name, SIZE) == top
        assert contents.reading_as(tx, name, 2 * SIZE) is None
        assert layers.chain(tx, top)[0].content == B
        assert contents.not_sealed(tx, [image, top]) == set()
        layers.mark_garbage(tx, [top])
        assert contents.reading_as(tx, name, SIZE) is None
        gone = LayerId(mint())
        assert contents.not_sealed(tx, [image, top, gone]) == {top, gone}
        contents.note(tx, gone, A, None)  # it went meanwhile: nothing to keep


def test_who_takes_a_place_takes_the_name(catalog: Catalog) -> None:
    """Also where it was looked at before, and has a name of its own."""
    with catalog.transaction() as tx:
        image = layer(tx)
        old = layer(tx, image)
        child = layer(tx, old, LayerState.ACTIVE)
        name = contents.name_of(B, contents.name_of(A, None))
        contents.note(tx, old, B, contents.name_of(A, None))
        new = layer(tx)
        snapshots.insert(tx, Maker().snapshot(new))
        contents.note(tx, new, C, None)
        layers.move_children(tx, old, new)
        assert layers.chain(tx, child)[1].id == new
        layers.mark_garbage(tx, [old])
        assert contents.reading_as(tx, name, SIZE) == new
        # What it holds itself is still what it holds itself.
        assert layers.chain(tx, new)[0].content == C
        contents.note(tx, new, C, None)
        assert contents.reading_as(tx, name, SIZE) == new
        # Nobody has looked at this one: the other keeps its own name.
        unknown, third = layer(tx), layer(tx)
        snapshots.insert(tx, Maker().snapshot(third))
        contents.note(tx, third, A, None)
        layers.move_children(tx, unknown, third)
        assert contents.reading_as(tx, contents.name_of(A, None), SIZE) == third
