"""The family tree of snapshots and sandboxes: what was made from what.

A snapshot hangs on the sandbox that it was taken of, and a sandbox on the snapshot that it was
restored from; a sandbox's snapshots stand in a row, the oldest first. What its row does not say is
said beside a snapshot: that it stands on another one than the one before it, after a revert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from stratabox.client.cli.app import App
from stratabox.client.cli.output import print_json, printable, size
from stratabox.client.records import SandboxRecord, SandboxState, Snapshot


@dataclass
class Node:
    """A sandbox or a snapshot, and what hangs on it."""

    record: SandboxRecord | Snapshot
    stands_on: Snapshot | None = None
    """Of a snapshot: the one that it was taken on, where that is not the one before it."""
    children: list[Node] = field(default_factory=list)


def show_tree(app: App, filters: Mapping[str, Any]) -> None:
    """Print the tree of the snapshots that fit, and of all sandboxes where there is no filter."""
    with app.client() as client:
        snapshots = client.snapshots.list(**filters)
        sandboxes = client.sandboxes.list(include_terminated=True)
    roots = family(sandboxes, snapshots)
    if any(filters.values()):
        roots = [root for root in roots if _holds_snapshot(root)]
    if app.json:
        print_json({"tree": [_nested(root) for root in roots]})
        return
    for root in roots:
        for line in draw(root):
            click.echo(line)


def family(sandboxes: Sequence[SandboxRecord], snapshots: Sequence[Snapshot]) -> list[Node]:
    """The trees, each from what has no origin any more, the oldest first.

    Terminated sandboxes are there for what was made of them alone.
    """
    boxes = {one.id: Node(one) for one in sandboxes}
    shots = {one.id: Node(one) for one in sorted(snapshots, key=_age)}
    roots: list[Node] = []
    for shot in shots.values():
        record = shot.record
        assert isinstance(record, Snapshot)
        below = shots.get(record.parent_snapshot_id or "")
        # What was taken of a sandbox that is gone hangs on what it stands on, if on anything.
        origin = boxes.get(record.source_sandbox_id or "") or below
        (origin.children if origin else roots).append(shot)
    for box in boxes.values():
        record = box.record
        assert isinstance(record, SandboxRecord)
        origin = shots.get(record.source_snapshot_id or "")
        if origin and _is_of(origin, record.id):
            origin = None  # reverted: it is where it was
        if box.children or record.state is not SandboxState.TERMINATED:
            (origin.children if origin else roots).append(box)
    for node in (*boxes.values(), *shots.values()):
        node.children.sort(key=lambda child: _age(child.record))
        _tell_what_it_stands_on(node, shots)
    return sorted(roots, key=lambda root: _age(root.record))


def draw(root: Node) -> Iterator[str]:
    """A tree as lines of text."""
    yield _line(root)
    # A stack, not a recursion: chains of copies of copies can be long.
    stack = _branches(root, "")
    while stack:
        node, indent, is_last = stack.pop()
        yield f"{indent}{'└── ' if is_last else '├── '}{_line(node)}"
        stack += _branches(node, indent + ("    " if is_last else "│   "))


def _branches(node: Node, indent: str) -> list[tuple[Node, str, bool]]:
    last = len(node.children) - 1
    found = [(child, indent, number == last) for number, child in enumerate(node.children)]
    return found[::-1]


def _line(node: Node) -> str:
    one = node.record
    if isinstance(one, Snapshot):
        words = ["snapshot", printable(one.name), f"({one.consistency or one.state})"]
        if node.stands_on:
            words.append(f"on {printable(node.stands_on.name)}")
    else:
        words = ["sandbox", printable(one.name), f"({one.state})"]
    words.append(f"own {size(one.space.own_bytes)}, shared {size(one.space.shared_bytes)}")
    return f"{one.id[:8]}  {' '.join(words)}"


def _nested(node: Node) -> dict[str, Any]:
    one = node.record
    said: dict[str, Any] = {
        "kind": "snapshot" if isinstance(one, Snapshot) else "sandbox",
        "id": one.id,
        "name": one.name,
        "state": one.state,
        "space": one.space,
        "created_at": one.created_at,
    }
    if isinstance(one, Snapshot):
        said["consistency"] = one.consistency
        said["parent_snapshot_id"] = one.parent_snapshot_id
    else:
        said["source_snapshot_id"] = one.source_snapshot_id
    return {**said, "children": [_nested(child) for child in node.children]}


def _tell_what_it_stands_on(node: Node, shots: Mapping[str, Node]) -> None:
    before = node.record.source_snapshot_id if isinstance(node.record, SandboxRecord) else None
    if isinstance(node.record, SandboxRecord) and _is_of(shots.get(before or ""), node.record.id):
        before = None
    for child in node.children:
        if isinstance(child.record, Snapshot) and isinstance(node.record, SandboxRecord):
            below = shots.get(child.record.parent_snapshot_id or "")
            if below is not None and below.record.id != before:
                assert isinstance(below.record, Snapshot)
                child.stands_on = below.record
            before = child.record.id


def _is_of(shot: Node | None, sandbox: str) -> bool:
    """Whether a snapshot was taken of that sandbox."""
    return (
        shot is not None
        and isinstance(shot.record, Snapshot)
        and shot.record.source_sandbox_id == sandbox
    )


def _holds_snapshot(root: Node) -> bool:
    stack = [root]
    while stack:
        node = stack.pop()
        if isinstance(node.record, Snapshot):
            return True
        stack += node.children
    return False


def _age(record: SandboxRecord | Snapshot) -> Any:
    return record.created_at, record.id
