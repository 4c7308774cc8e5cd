"""Which layers are written anew, and what must hold when all jobs are done: on any forest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratabox.storage.catalog import (
    chains,
    garbage,
    images,
    jobs,
    layers,
    sandboxes,
    snapshots,
)
from stratabox.storage.catalog.chains import Node, plan
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.catalog.disks import OF_SNAPSHOTS
from stratabox.storage.model.errors import DeniedError
from stratabox.storage.model.ids import LayerId, SandboxId, SnapshotId
from stratabox.storage.model.records import Job
from stratabox.storage.model.states import ImageState, JobKind, JobState, LayerState
from support.records import Maker, scratch

Content = tuple[LayerId, ...]
"""What layers have written, the topmost first, by the names that they had at first."""


@dataclass
class Forest:
    """Records in a catalog, and what each layer holds."""

    tx: Transaction
    maker: Maker
    holds: dict[LayerId, Content] = field(default_factory=dict)
    images: list[LayerId] = field(default_factory=list)
    boxes: list[SandboxId] = field(default_factory=list)
    points: list[SnapshotId] = field(default_factory=list)

    def layer(self, parent: LayerId | None, state: LayerState) -> LayerId:
        layer = self.maker.layer(parent, state=state)
        layers.insert(self.tx, layer)
        self.holds[layer.id] = (layer.id,)
        return layer.id

    def image(self) -> None:
        layer = self.layer(None, LayerState.SEALED)
        images.insert(self.tx, self.maker.image(state=ImageState.READY, layer=layer))
        self.images.append(layer)

    def box(self, below: LayerId | None) -> None:
        record = self.maker.sandbox(self.layer(below, LayerState.ACTIVE))
        self.boxes.append(sandboxes.insert(self.tx, record).id)

    def snapshot(self, box: SandboxId) -> None:
        (disk,) = sandboxes.get(self.tx, box).disks
        overlay = self.layer(disk.layer, LayerState.ACTIVE)
        layers.seal(self.tx, {disk.layer: 4096})
        sandboxes.change(self.tx, box, disks=(replace(disk, layer=overlay),))
        self.points.append(snapshots.insert(self.tx, self.maker.snapshot(disk.layer)).id)

    def top(self, point: SnapshotId) -> LayerId:
        (disk,) = OF_SNAPSHOTS.of(self.tx, point)
        return disk.layer

    def content(self, top: LayerId) -> Content:
        return tuple(part for layer in layers.chain(self.tx, top) for part in self.holds[layer.id])

    def contents(self) -> dict[str, Content]:
        """What everything that there is holds."""
        tops = {str(point): self.top(point) for point in self.points}
        tops |= {str(box): sandboxes.get(self.tx, box).disks[0].layer for box in self.boxes}
        tops |= {str(layer): layer for layer in self.images}
        return {name: self.content(top) for name, top in tops.items()}

    def act(self, what: int, which: int) -> None:
        """One thing of those that happen to a store."""
        if what in (0, 1, 2) and self.boxes:
            self.snapshot(self.boxes[which % len(self.boxes)])
        elif what == 3 and self.points:
            self.box(self.top(self.points[which % len(self.points)]))
        elif what in (4, 5) and self.points:
            snapshots.delete(self.tx, self.points.pop(which % len(self.points)))
        elif what == 6 and self.boxes:
            sandboxes.delete(self.tx, self.boxes.pop(which % len(self.boxes)))
        elif what == 7:
            self.box([*self.images, None][which % (len(self.images) + 1)])
        self.sweep()

    def sweep(self) -> None:
        doomed = garbage.take(self.tx)
        layers.mark_garbage(self.tx, doomed)
        layers.drop(self.tx, doomed)

    def work(self, max_depth: int) -> JobKind | None:
        """Do one job; None: there is none."""
        job = begin(self.tx, max_depth)
        if job is None:
            return None
        made_of = chains.sources(self.tx, job)
        assert not {layer.id for layer in made_of} & set(self.images)
        assert all(layer.state is LayerState.SEALED for layer in made_of)
        self.holds[job.target] = tuple(p for layer in made_of for p in self.holds[layer.id])
        done = chains.replace_layer(self.tx, job, made_of, size=4096, compressed=False)
        assert done is not None
        jobs.change(self.tx, job.id, state=JobState.DONE)
        self.sweep()
        return job.kind

    def is_idle(self, layer: LayerId) -> bool:
        return (
            layer not in layers.referenced(self.tx)
            and len(self.tx.rows("SELECT id FROM layers WHERE parent = ?", (layer,))) == 1
        )


def begin(tx: Transaction, max_depth: int) -> Job | None:
    after: int | None = 0
    while after is not None:
        found = chains.next_job(tx, max_depth, after=after)
        if found.job is not None:
            return found.job
        after = found.after
    return None


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    acts=st.lists(
        st.tuples(st.integers(0, 7), st.integers(0, 40), st.booleans()), min_size=15, max_size=70
    ),
    max_depth=st.integers(4, 6),
)
def test_when_all_jobs_are_done(
    catalog: Catalog, maker: Maker, acts: list[tuple[int, int, bool]], max_depth: int
) -> None:
    with scratch(catalog) as tx:
        forest = Forest(tx, maker)
        forest.image()
        forest.box(forest.images[0])
        for what, which, works in acts:
            forest.act(what, which)
            if works:
                before = forest.contents()
                forest.work(max_depth)
                assert forest.contents() == before
        before = forest.contents()
        made = 0
        while forest.work(max_depth):
            made += 1
            assert made < 10 * len(acts)
        assert forest.contents() == before
        for top in layers.referenced(tx):
            chain = layers.chain(tx, top)
            assert len(chain) <= max_depth
            idle = [layer.id for layer in chain if forest.is_idle(layer.id)]
            # All are merged but one that only an active layer stands on.
            assert all(layer == chain[1].id for layer in idle)
            assert not idle or chain[0].state is LayerState.ACTIVE
        assert begin(tx, max_depth) is None
        assert tx.rows("SELECT * FROM chain_hints") == []


def test_two_hundred_snapshots_one_after_the_other(catalog: Catalog, maker: Maker) -> None:
    with scratch(catalog) as tx:
        forest = Forest(tx, maker)
        forest.image()
        forest.box(forest.images[0])
        for _ in range(200):
            forest.snapshot(forest.boxes[0])
        kinds = []
        while (kind := forest.work(16)) is not None:
            kinds.append(kind)
        assert set(kinds) == {JobKind.FLATTEN}
        assert len(kinds) == 14
        assert max(layers.depth(tx, forest.top(point)) for point in forest.points) in (15, 16)
        for point in forest.points[3:]:
            snapshots.delete(tx, point)
        del forest.points[3:]
        forest.sweep()
        while forest.work(16):
            pass
        # The image, three snapshots, what was written since in one, and the guest's own.
        assert tx.rows("SELECT count(*) AS n FROM layers")[0]["n"] == 6


def node(name: str, parent: str | None, **fields: object) -> tuple[LayerId, Node]:
    given: dict[str, object] = {
        "sealed": True, "named": False, "image": parent is None, "children": 1,
    }  # fmt: skip
    made = Node(
        id=LayerId(name), parent=None if parent is None else LayerId(parent),
        **given | fields,  # type: ignore[arg-type]
    )  # fmt: skip
    return made.id, made


@pytest.mark.parametrize(
    ("above", "planned"),
    [
        pytest.param([node("c", "b", named=True)], [("merge", "c", "i")], id="kept"),
        pytest.param([node("c", "b", children=2)], [("merge", "c", "i")], id="branches"),
        pytest.param(
            [node("c", "b", sealed=False, named=True)], [("merge", "b", "i")], id="active"
        ),
        pytest.param([node("c", "b", children=0)], [], id="garbage"),
    ],
)
def test_idle_layers(
    above: list[tuple[LayerId, Node]], planned: list[tuple[str, str, str | None]]
) -> None:
    nodes = dict([node("i", None), node("a", "i"), node("b", "a"), *above])
    found = [(each.kind.value, each.layer, each.base) for each in plan(nodes, 16)]
    assert found == planned


class TestReplacing:
    """What waits, and what was asked for, follows a layer that is replaced."""

    @pytest.fixture
    def tx(self, catalog: Catalog) -> object:
        with scratch(catalog) as tx:
            yield tx

    @pytest.fixture
    def forest(self, tx: Transaction, maker: Maker) -> Forest:
        forest = Forest(tx, maker)
        forest.image()
        forest.box(forest.images[0])
        for _ in range(3):
            forest.snapshot(forest.boxes[0])
        assert forest.work(16) is None
        return forest

    def delete(self, forest: Forest, number: int) -> None:
        snapshots.delete(forest.tx, forest.points.pop(number))
        forest.sweep()

    def test_a_compaction_follows_a_merge(self, forest: Forest) -> None:
        self.delete(forest, 1)
        top = snapshots.get(forest.tx, forest.points[1])
        merge = begin(forest.tx, 16)
        assert merge is not None
        (wish,) = chains.ask_to_compact(forest.tx, top)
        assert chains.ask_to_compact(forest.tx, top) == [wish]
        made_of = chains.sources(forest.tx, merge)
        done = chains.replace_layer(forest.tx, merge, made_of, size=77, compressed=False)
        assert done is not None
        (changed,) = done.snapshots
        assert (changed.id, changed.layer_bytes) == (top.id, 77)
        jobs.change(forest.tx, merge.id, state=JobState.DONE)
        compact = begin(forest.tx, 16)
        assert compact is not None
        assert (compact.id, compact.layer) == (wish.id, merge.target)
        assert [layer.id for layer in chains.sources(forest.tx, compact)] == [merge.target]

    def test_nothing_is_replaced_that_nobody_needs(self, forest: Forest) -> None:
        tx = forest.tx
        assert chains.ask_to_compact(tx, snapshots.get(tx, forest.points[2]))
        job = begin(tx, 16)
        assert job is not None
        made_of = chains.sources(tx, job)
        sandboxes.delete(tx, forest.boxes[0])
        self.delete(forest, 2)
        assert chains.replace_layer(tx, job, made_of, size=1, compressed=True) is None

    def test_a_wish_ends_with_its_snapshot(self, forest: Forest) -> None:
        tx = forest.tx
        (job,) = chains.ask_to_compact(tx, snapshots.get(tx, forest.points[2]))
        sandboxes.delete(tx, forest.boxes.pop())
        self.delete(forest, 2)
        assert begin(tx, 16) is None
        assert jobs.get(tx, job.id).state is JobState.CANCELLED

    def test_a_chain_that_changed_is_left_alone(self, forest: Forest) -> None:
        tx = forest.tx
        self.delete(forest, 1)
        merge = begin(tx, 16)
        assert merge is not None
        made_of = chains.sources(tx, merge)
        assert len(made_of) == 2
        first = chains.replace_layer(tx, merge, made_of, size=1, compressed=False)
        assert first is not None
        again = replace(merge, target=LayerId("x"))
        assert chains.replace_layer(tx, again, made_of, size=1, compressed=False) is None

    @pytest.mark.parametrize(
        ("state", "reason"), [(JobState.FAILED, "LAYER_UNFIT: so"), (JobState.PAUSED, "")]
    )
    def test_what_cannot_be_done_or_is_paused_is_not_begun_again(
        self, forest: Forest, state: JobState, reason: str
    ) -> None:
        self.delete(forest, 1)
        merge = begin(forest.tx, 16)
        assert merge is not None
        jobs.change(forest.tx, merge.id, state=state, reason=reason)
        chains.hint(forest.tx, merge.layer)
        assert begin(forest.tx, 16) is None

    @pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
    def test_what_failed_or_was_cancelled_waits_for_a_change_of_its_chain(
        self, forest: Forest, state: JobState
    ) -> None:
        tx = forest.tx
        forest.box(forest.images[0])
        for _ in range(2 * chains.HINTS):
            forest.snapshot(forest.boxes[0])
        self.delete(forest, 1)
        # More hints of the chain than one look takes, all of before it ended: it is tried once.
        for layer in layers.everything(tx):
            chains.hint(tx, layer.id)
        tried = [begin(tx, 128)]
        for _ in range(3):
            job = tried[-1]
            assert job is not None
            jobs.change(tx, job.id, state=state, reason="HOST_DISK_FAILED: so")
            assert begin(tx, 128) is None
            assert tx.rows("SELECT * FROM chain_hints") == []
            forest.snapshot(forest.boxes[1])  # another chain's change is none of this one's
            assert begin(tx, 128) is None
            forest.snapshot(forest.boxes[0])
            tried.append(begin(tx, 128))
        same = {(job.kind, job.layer, job.base) for job in tried if job is not None}
        assert len(same) == 1
        # The last one is kept to be looked at, and no more of them.
        assert [job.id for job in jobs.everything(tx, over=True)] == [
            job.id for job in tried[-2:] if job is not None
        ]

    def test_a_change_while_it_is_stopped_counts_when_the_hint_is_there_already(
        self, forest: Forest
    ) -> None:
        tx = forest.tx
        self.delete(forest, 1)
        merge = begin(tx, 16)
        assert merge is not None
        assert tx.rows("SELECT * FROM chain_hints")
        jobs.change(tx, merge.id, state=JobState.CANCELLED, reason="by request")
        chains.hint(tx, merge.layer)
        again = begin(tx, 16)
        assert again is not None
        assert (again.layer, again.base) == (merge.layer, merge.base)
        assert again.id != merge.id

    def test_what_is_postponed_lets_others_go_first(self, forest: Forest) -> None:
        self.delete(forest, 1)
        merge = begin(forest.tx, 16)
        assert merge is not None
        jobs.change(forest.tx, merge.id, state=JobState.QUEUED)
        (wish,) = chains.ask_to_compact(forest.tx, snapshots.get(forest.tx, forest.points[0]))
        found = chains.next_job(forest.tx, 16, {merge.id})
        assert found.job is not None
        assert found.job.id == wish.id

    def test_what_is_postponed_is_not_looked_at_forever(self, forest: Forest) -> None:
        for _ in range(3 * chains.HINTS):
            forest.snapshot(forest.boxes[0])
        self.delete(forest, 1)
        for layer in layers.everything(forest.tx):
            chains.hint(forest.tx, layer.id)
        merge = begin(forest.tx, 128)
        assert merge is not None
        jobs.change(forest.tx, merge.id, state=JobState.QUEUED)
        after: int | None = 0
        looks = 0
        while after is not None:
            found = chains.next_job(forest.tx, 128, {merge.id}, after)
            assert found.job is None
            after = found.after
            looks += 1
        assert looks < 10

    def test_an_image_is_not_compacted(self, forest: Forest) -> None:
        record = forest.maker.snapshot(forest.images[0])
        with pytest.raises(DeniedError, match="an image's own layer"):
            chains.ask_to_compact(forest.tx, snapshots.insert(forest.tx, record))
