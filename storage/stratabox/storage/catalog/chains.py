"""Keeping chains short: which layers are to be written anew, and how a new one takes its place.

```
 MERGE     kept ─▶ idle ─▶ idle ─▶ base          FLATTEN   … ─▶ X ─▶ 14 layers ─▶ lowest
           kept' ────────────────▶ base                    … ─▶ X' ────────────▶ lowest
```

An *idle* layer is sealed, no record names it, and exactly one layer stands on it: nobody needs it
but that one. `plan` is pure and decides on a part of the forest. Which part is looked at, triggers
note as *hints* (``migrations/0004_store.sql``): only around a layer that has got or lost something
can there be anything to do. So a look costs what has changed, with a hundred thousand layers too.

The lowest layer of a chain is never flattened into: as a rule it is an image's, which others share.
An image's is never merged either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from stratabox.storage.catalog import jobs, layers, snapshots
from stratabox.storage.catalog.database import Row, Transaction
from stratabox.storage.model.errors import DeniedError
from stratabox.storage.model.ids import JobId, LayerId, SandboxId, SnapshotId, mint
from stratabox.storage.model.records import Job, Layer, Snapshot
from stratabox.storage.model.states import JobKind, JobState, LayerState

_UNFIT = "LAYER_UNFIT:"
"""How the reason begins of a job that cannot but fail again: a sealed layer stays what it is."""

UNNEEDED = "nothing needs it any more, or what it stands on has changed"
"""The reason of a job that was begun, and is not what is to be done any more."""

MOST_CONCERNED = 100
HINTS = 10
"""Looked at in one transaction, each with its chain."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What matters of a layer."""

    id: LayerId
    parent: LayerId | None
    sealed: bool
    named: bool
    """A record has it."""
    image: bool
    """An image has it."""
    children: int

    @property
    def is_idle(self) -> bool:
        """Nobody needs it but the one that stands on it."""
        return self.sealed and not self.named and not self.image and self.children == 1

    @property
    def is_over(self) -> bool:
        """Nobody needs it at all: the next sweep takes it."""
        return self.sealed and not self.named and not self.image and not self.children


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layer to be written anew, with those between it and `base`."""

    kind: JobKind
    layer: LayerId
    base: LayerId | None


def plan(nodes: Mapping[LayerId, Node], max_depth: int) -> list[Plan]:
    """What there is to do, the lowest first.

    :param nodes: with each layer all that it stands on.
    """
    depths = _depths(nodes)
    plans: list[Plan] = []
    merged: set[LayerId] = set()
    for node in sorted(nodes.values(), key=lambda each: (depths[each.id], each.id)):
        if node.image or node.is_idle or node.is_over:
            continue
        run = [*([node.id] if node.sealed else []), *_idle_below(nodes, node)]
        # One alone is as short as it gets. What is written cannot be merged into: so those below
        # an active layer become one among themselves.
        if len(run) > 1:
            plans.append(Plan(kind=JobKind.MERGE, layer=run[0], base=nodes[run[-1]].parent))
            merged.update(run)
    for node in nodes.values():
        too_high = depths[node.id] == max_depth and node.children
        if too_high and node.sealed and not node.image and node.id not in merged:
            base = _lowest(nodes, node)
            plans.append(Plan(kind=JobKind.FLATTEN, layer=node.id, base=base))
    return plans


@dataclass(frozen=True, kw_only=True)
class Next:
    """What is to be done now."""

    job: Job | None
    """It is RUNNING."""
    after: int | None = None
    """Not all was looked at yet: ask again, from there on."""


def next_job(
    tx: Transaction, max_depth: int, postponed: Collection[JobId] = (), after: int = 0
) -> Next:
    """Note what has become necessary, and begin the oldest job that still is.

    :param postponed: jobs that are not to be begun now.
    :param after: what was looked at already, as the answer before has it.
    """
    further = _plan_hinted(tx, max_depth, after)
    for job in jobs.in_states(tx, JobState.QUEUED):
        ready = None if job.id in postponed else _renewed(tx, job, max_depth)
        if ready is not None:
            begun = jobs.change(
                tx, ready.id, state=JobState.RUNNING, started_at=job.started_at or tx.now,
                kind=ready.kind, base=ready.base, reason="",
            )  # fmt: skip
            return Next(job=begun)
    return Next(job=None, after=further)


def sources(tx: Transaction, job: Job) -> list[Layer]:
    """The layers that a job puts together, the topmost first.

    :raise CorruptError: LAYER_MISSING.
    """
    found = []
    for layer in layers.chain(tx, job.layer):
        if layer.id == job.base:
            break
        found.append(layer)
        if job.kind is JobKind.COMPACT:
            break
    return found


def ask_to_compact(tx: Transaction, snapshot: Snapshot) -> list[Job]:
    """Queue what a snapshot's own layers need to be compressed; what waits already is not doubled.

    :return: none, where all are compressed.
    :raise DeniedError: INVALID_STATE, for a layer of an image.
    """
    asked = []
    for layer in dict.fromkeys(disk.layer for disk in snapshot.disks):
        node = _node(tx, layer)
        assert node is not None
        if node.image:
            raise DeniedError(
                f"snapshot {snapshot.name!r} has an image's own layer, which is not rewritten",
                snapshot=snapshot.id,
            )
        if layers.chain(tx, layer)[0].compressed:
            continue
        waiting = [
            job for job in jobs.of_layer(tx, layer)
            if job.kind is JobKind.COMPACT and not job.state.is_over
        ]  # fmt: skip
        asked += waiting or [_queue(tx, Plan(kind=JobKind.COMPACT, layer=layer, base=node.parent))]
    return asked


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """What has changed with a layer that was replaced."""

    job: Job
    snapshots: Sequence[Snapshot]
    """That have the new one now."""


def replace_layer(
    tx: Transaction, job: Job, made_of: Sequence[Layer], *, size: int, compressed: bool
) -> Replaced | None:
    """Let a job's target take the place of its layer, in everything that is known of it.

    :param made_of: what was put together, the topmost first.
    :param size: of the target's file, bytes on the disk.
    :return: None when that is not to be done any more: the job was stopped, nobody needs the
        layer, or its chain has changed.
    """
    old = made_of[0]
    if jobs.get(tx, job.id).state is not JobState.RUNNING:
        return None
    node = _node(tx, old.id)
    if node is None or not node.sealed or not (node.named or node.children):
        return None
    now = layers.chain(tx, old.id)[: len(made_of)]
    if [layer.id for layer in now] != [layer.id for layer in made_of]:
        return None
    layers.insert(
        tx,
        Layer(
            id=job.target,
            parent=now[-1].parent,
            state=LayerState.SEALED,
            size=old.size,
            created_at=tx.now,
            sealed_at=tx.now,
            backing=job.base,
            bytes=size,
            compressed=compressed,
            content=old.content if len(made_of) == 1 else None,
        ),
    )
    layers.move_children(tx, old.id, job.target)
    changed = [_restand(tx, each, old.id, job.target) for each in snapshots.all_holding(tx, old.id)]
    tx.execute(
        "UPDATE volume_snapshots SET layer = ?, generation = ? WHERE layer = ?",
        (job.target, tx.next_generation(), old.id),
    )
    jobs.follow(tx, old.id, job.target, but=job.id)
    hint(tx, job.target)
    return Replaced(job=jobs.change(tx, job.id, done_bytes=job.total_bytes), snapshots=changed)


def sandboxes_on(tx: Transaction, layer: LayerId) -> list[SandboxId]:
    """Sandboxes that have a disk, or a volume, whose chain goes through a layer."""
    rows = tx.rows(
        """
        WITH RECURSIVE above (id) AS (
            SELECT ? UNION SELECT layers.id FROM layers JOIN above ON layers.parent = above.id
        )
        SELECT sandbox FROM disks WHERE layer IN above
        UNION SELECT sandbox FROM attachments
            JOIN volumes ON volumes.id = attachments.volume WHERE volumes.layer IN above
        """,
        (layer,),
    )
    return [SandboxId(row["sandbox"]) for row in rows]


@dataclass(frozen=True, kw_only=True)
class Concerned:
    """What stands on a job's layer, or on the one that has replaced it."""

    snapshots: Sequence[SnapshotId]
    """So many at most as `MOST_CONCERNED`."""
    sandboxes: Sequence[SandboxId]


def concerned(tx: Transaction, job: Job) -> Concerned:
    """Whom a job concerns."""
    layer = job.target if layers.exists(tx, job.target) else job.layer
    rows = tx.rows(
        """
        WITH RECURSIVE above (id) AS (
            SELECT ? UNION SELECT layers.id FROM layers JOIN above ON layers.parent = above.id
        )
        SELECT DISTINCT snapshot FROM snapshot_disks WHERE layer IN above LIMIT ?
        """,
        (layer, MOST_CONCERNED),
    )
    return Concerned(
        snapshots=[SnapshotId(row["snapshot"]) for row in rows],
        sandboxes=sandboxes_on(tx, layer),
    )


def chains_of(tx: Transaction, sandbox: SandboxId) -> list[list[Layer]]:
    """The chain of each disk and volume of a sandbox, as it is now, each with its top first."""
    rows = tx.rows(
        "SELECT layer FROM disks WHERE sandbox = :sandbox"
        " UNION ALL SELECT layer FROM attachments JOIN volumes ON volumes.id = attachments.volume"
        " WHERE sandbox = :sandbox AND layer IS NOT NULL",
        {"sandbox": sandbox},
    )
    return [layers.chain(tx, LayerId(row["layer"])) for row in rows]


def hint(tx: Transaction, layer: LayerId) -> None:
    """There may be something to do around a layer."""
    tx.execute("INSERT OR IGNORE INTO chain_hints VALUES (?)", (layer,))


def _restand(tx: Transaction, snapshot: SnapshotId, old: LayerId, new: LayerId) -> Snapshot:
    record = snapshots.get(tx, snapshot)
    disks = tuple(replace(disk, layer=new) if disk.layer == old else disk for disk in record.disks)
    own = {disk.layer: layers.get(tx, disk.layer) for disk in disks}
    return snapshots.change(
        tx, snapshot, disks=disks, layer_bytes=sum(layer.bytes for layer in own.values())
    )


def _plan_hinted(tx: Transaction, max_depth: int, after: int) -> int | None:
    """Queue what some hints lead to, and drop those that lead to nothing any more.

    :return: where the next ones begin; None: these were the last.
    """
    rows = tx.rows(
        "SELECT chain_hints.rowid, layer, generation FROM chain_hints JOIN chain_changes"
        " USING (layer) WHERE chain_hints.rowid > ? ORDER BY chain_hints.rowid LIMIT ?",
        (after, HINTS),
    )
    for row in rows:
        layer = LayerId(row["layer"])
        leads_on = False
        for each in plan(_around(tx, layer), max_depth):
            state = _state_of(tx, each, row["generation"])
            if state is None:
                _forget_but_last(tx, each)
                _queue(tx, each)
            leads_on = leads_on or state in (None, JobState.QUEUED, JobState.RUNNING)
        if not leads_on:
            tx.execute("DELETE FROM chain_hints WHERE layer = ?", (layer,))
    return rows[-1]["rowid"] if len(rows) == HINTS else None


def _state_of(tx: Transaction, wanted: Plan, changed: int) -> JobState | None:
    """What has become of a plan; None: it is new, or to be tried anew.

    :param changed: the generation in which its chain has last changed. What failed or was cancelled
        before that stands for nothing any more.
    """
    for job in jobs.of_layer(tx, wanted.layer):
        if job.kind is JobKind.COMPACT and job.state is JobState.QUEUED:
            continue  # the one does not stand for the other
        if not job.state.is_over:
            return job.state
    for job in _given_up(tx, wanted):
        if job.ended_generation > changed or job.reason.startswith(_UNFIT):
            return job.state
    return None


def _given_up(tx: Transaction, wanted: Plan) -> list[Job]:
    """The jobs that were to do it, and failed or were cancelled; oldest first."""
    return [
        job
        for job in jobs.of_layer(tx, wanted.layer)
        if (job.kind, job.base) == (wanted.kind, wanted.base)
        and job.state in (JobState.FAILED, JobState.CANCELLED)
    ]


def _forget_but_last(tx: Transaction, wanted: Plan) -> None:
    """Keep rows from piling up of what fails after each change again."""
    for job in _given_up(tx, wanted)[:-1]:
        jobs.forget(tx, job.id)


def _queue(tx: Transaction, wanted: Plan) -> Job:
    return jobs.insert(
        tx,
        Job(
            id=JobId(mint()),
            kind=wanted.kind,
            state=JobState.QUEUED,
            layer=wanted.layer,
            base=wanted.base,
            target=LayerId(mint()),
            created_at=tx.now,
        ),
    )


def _renewed(tx: Transaction, job: Job, max_depth: int) -> Job | None:
    """A waiting job as it is to be done now; None: not any more, and it is dealt with."""
    if job.kind is JobKind.COMPACT:
        node = _node(tx, job.layer)
        if node is not None and (node.named or node.children):
            return replace(job, base=node.parent)
        reason = "the snapshot is gone"
        jobs.change(tx, job.id, state=JobState.CANCELLED, reason=reason)
        return None
    for each in plan(_around(tx, job.layer), max_depth):
        if each.layer == job.layer:
            return replace(job, kind=each.kind, base=each.base)
    if job.started_at is None:
        jobs.forget(tx, job.id)
    else:  # somebody may have seen it, or wait for it
        jobs.change(tx, job.id, state=JobState.CANCELLED, reason=UNNEEDED)
    return None


def _around(tx: Transaction, layer: LayerId) -> dict[LayerId, Node]:
    """A layer's chain, from the next one above it that is not idle."""
    nodes: dict[LayerId, Node] = {}
    node = _node(tx, layer)
    while node is not None and node.is_idle:
        row = tx.row("SELECT id FROM layers WHERE parent = ? AND state != 'garbage'", (node.id,))
        assert row is not None
        node = _node(tx, LayerId(row["id"]))
    while node is not None:
        nodes[node.id] = node
        node = None if node.parent is None else _node(tx, node.parent)
    return nodes


def _node(tx: Transaction, layer: LayerId) -> Node | None:
    """One layer; None when it is gone or about to go."""
    row: Row | None = tx.row(
        """
        SELECT id, parent, state,
            EXISTS (SELECT 1 FROM disks WHERE layer = :layer)
            OR EXISTS (SELECT 1 FROM snapshot_disks WHERE layer = :layer)
            OR EXISTS (SELECT 1 FROM volumes WHERE layer = :layer)
            OR EXISTS (SELECT 1 FROM volume_snapshots WHERE layer = :layer) AS named,
            EXISTS (SELECT 1 FROM images WHERE layer = :layer) AS image,
            (SELECT count(*) FROM layers child WHERE child.parent = :layer
                AND child.state != 'garbage') AS children
        FROM layers WHERE id = :layer AND state != 'garbage'
        """,
        {"layer": layer},
    )
    if row is None:
        return None
    return Node(
        id=LayerId(row["id"]),
        parent=None if row["parent"] is None else LayerId(row["parent"]),
        sealed=row["state"] == LayerState.SEALED,
        named=bool(row["named"]),
        image=bool(row["image"]),
        children=row["children"],
    )


def _depths(nodes: Mapping[LayerId, Node]) -> dict[LayerId, int]:
    """Layers in the chain below and with each."""
    depths: dict[LayerId, int] = {}
    for node in nodes.values():
        path = []
        at: LayerId | None = node.id
        while at is not None and at not in depths:
            path.append(at)
            at = nodes[at].parent
        depth = depths[at] if at is not None else 0
        for layer in reversed(path):
            depth += 1
            depths[layer] = depth
    return depths


def _idle_below(nodes: Mapping[LayerId, Node], node: Node) -> list[LayerId]:
    """The idle layers right below one, the topmost first."""
    run = []
    while node.parent is not None and nodes[node.parent].is_idle:
        node = nodes[node.parent]
        run.append(node.id)
    return run


def _lowest(nodes: Mapping[LayerId, Node], node: Node) -> LayerId:
    while node.parent is not None:
        node = nodes[node.parent]
    return node.id
