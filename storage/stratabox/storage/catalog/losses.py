"""Records of what was lost: rows whose files are gone, written down so that everybody is told.

A snapshot whose disks cannot be read is FAILED, a sandbox that cannot be started too, and their
reasons say what is gone. Nothing else of the record changes, and no row is removed: when the files
were put back, the records are what they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from stratabox.storage.catalog import layers, sandboxes, snapshots, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.ids import LayerId, SandboxId, SnapshotId, VolumeId
from stratabox.storage.model.records import Sandbox, Snapshot
from stratabox.storage.model.states import SandboxState, SnapshotState

LOST = "lost: "
"""How such a reason begins."""
BACK = "what was lost is back"


def note(
    tx: Transaction, missing_layers: Collection[LayerId], missing_rams: Collection[str]
) -> list[Sandbox | Snapshot]:
    """Write down what needs the missing files, and take back what is not missing any more.

    :param missing_rams: ids of saved memory.
    :return: the records that were changed.
    """
    gone: dict[str, LayerId] = {}
    for layer in sorted(missing_layers):
        for user in layers.users(tx, layer):
            gone.setdefault(user, layer)
    memories = _standing_on(tx, missing_rams)
    told = {
        str(row["id"])
        for table, column in (
            ("snapshots", "failure_reason"),
            ("sandboxes", "state_reason"),
            ("volumes", "reason"),
        )
        for row in tx.rows(f"SELECT id FROM {table} WHERE {column} LIKE '{LOST}%'")
    }
    changed: list[Sandbox | Snapshot] = []
    for id in sorted(told | gone.keys() | memories):
        if tx.row("SELECT id FROM snapshots WHERE id = ?", (id,)):
            snapshot = snapshots.get(tx, SnapshotId(id))
            changed += _snapshot(tx, snapshot, gone.get(id), memory_gone=id in memories)
        elif tx.row("SELECT id FROM sandboxes WHERE id = ?", (id,)):
            sandbox = sandboxes.get(tx, SandboxId(id))
            parked = sandbox.ram_parked in memories if sandbox.ram_parked else False
            changed += _sandbox(tx, sandbox, gone.get(id), memory_gone=parked)
        elif tx.row("SELECT id FROM volumes WHERE id = ?", (id,)):
            lost = gone.get(id)
            volumes.change(tx, VolumeId(id), reason="" if lost is None else _of_layer(lost))
    return changed


def _snapshot(
    tx: Transaction, snapshot: Snapshot, layer: LayerId | None, *, memory_gone: bool
) -> Iterable[Snapshot]:
    was_lost = snapshot.failure_reason.startswith(LOST)
    state, reason = SnapshotState.READY, ""
    if layer is not None:
        state, reason = SnapshotState.FAILED, _of_layer(layer)
    elif memory_gone:
        reason = f"{LOST}a file of its saved memory is gone; restore its disks with --cold"
    if snapshot.state is not SnapshotState.READY and not was_lost:
        return  # it failed by itself, or is on its way
    if (state, reason) != (snapshot.state, snapshot.failure_reason):
        yield snapshots.change(tx, snapshot.id, state=state, failure_reason=reason)


def _sandbox(
    tx: Transaction, sandbox: Sandbox, layer: LayerId | None, *, memory_gone: bool
) -> Iterable[Sandbox]:
    state, reason = sandbox.state, sandbox.state_reason
    if layer is not None:
        # One that has a process has its files open, and one that is paused to disk its memory.
        state = SandboxState.FAILED if state is SandboxState.STOPPED else state
        reason = _of_layer(layer)
    elif memory_gone:
        reason = f"{LOST}a file of its saved memory is gone; stop it, and start it from its disks"
    elif reason.startswith(LOST):
        state = SandboxState.STOPPED if state is SandboxState.FAILED else state
        reason = "" if state is SandboxState.RUNNING else BACK
    if not sandbox.state.is_over and (state, reason) != (sandbox.state, sandbox.state_reason):
        yield sandboxes.change(tx, sandbox.id, state=state, state_reason=reason)


def _of_layer(layer: LayerId) -> str:
    return (
        f"{LOST}the file of layer {layer} is gone; put it back from a backup of the state folder"
        " and start the daemon again, or delete this"
    )


def _standing_on(tx: Transaction, missing: Collection[str]) -> set[str]:
    """Ids of saved memory that needs any of those."""
    found: set[str] = set()
    for ram in missing:
        rows = tx.rows(
            """
            WITH RECURSIVE above (id) AS (
                SELECT ? UNION SELECT rams.id FROM rams JOIN above ON rams.parent = above.id
            )
            SELECT id FROM above
            """,
            (ram,),
        )
        found |= {str(row["id"]) for row in rows}
    return found
