"""Any tree of snapshots and copies, taken down in any order: what is left stays what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stratabox.client import Client, Image, Sandbox, SandboxState
from support import disks
from support.daemon import DaemonProcess
from support.stored import Stored, wait_until

BLOCK = 4096
SLOTS = 4
GUESTS = 4
"""Living at once, at most."""

Content = tuple[int, ...]
"""What each block of the data disk begins with; 0: nothing was written there."""

EMPTY: Content = (0,) * SLOTS

PICK = st.integers(0, 11)


@dataclass
class Tree:
    """The model: what everything that lives must hold, and from which sandbox a snapshot is."""

    sandboxes: dict[str, Content] = field(default_factory=dict)
    snapshots: dict[str, Content] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


class Deletes(RuleBasedStateMachine):
    """Guests rest (paused or stopped) but for the moment in which one writes: so all is quick,
    and what lies on the disk stands still while it is looked at.
    """

    def __init__(
        self, client: Client, stored: Stored, root: str, ground: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.client = client
        self.stored = stored
        self.root = root
        self.ground = ground
        self.tree = Tree()
        self.number = 0
        self.seals: dict[str, str] = {}
        self.space = stored.bytes_on_disk()

    @initialize()
    def begin(self) -> None:
        """A start that has something to lose."""
        self._restore(self.root, EMPTY)
        self._write(self._box(0), 0)
        self.snapshot(0)
        self._write(self._box(0), 1)
        self.clone(0)

    @rule(pick=PICK, slot=st.integers(0, SLOTS - 1))
    @precondition(lambda self: self.tree.sandboxes)
    def write(self, pick: int, slot: int) -> None:
        self._write(self._box(pick), slot)

    @rule(pick=PICK)
    @precondition(lambda self: self.tree.sandboxes)
    def snapshot(self, pick: int) -> None:
        box = self._box(pick)
        self._know(box.snapshot().id, box.id)

    @rule(pick=PICK)
    @precondition(lambda self: len(self.tree.sandboxes) < GUESTS)
    def restore(self, pick: int) -> None:
        there = self.tree.snapshots | {self.root: EMPTY}
        snapshot = _one(there, pick)
        self._restore(snapshot, there[snapshot])

    @rule(pick=PICK)
    @precondition(lambda self: 0 < len(self.tree.sandboxes) < GUESTS)
    def clone(self, pick: int) -> None:
        box = self._box(pick)
        result = box.clone(wait_for_ready=False)
        result.sandbox.pause()
        self._know(result.snapshot.id, box.id)
        self.tree.sandboxes[result.sandbox.id] = self.tree.sandboxes[box.id]

    @rule(pick=PICK)
    @precondition(lambda self: set(self.tree.sources.values()) & self.tree.sandboxes.keys())
    def revert(self, pick: int) -> None:
        own = {
            snapshot: source
            for snapshot, source in self.tree.sources.items()
            if source in self.tree.sandboxes
        }
        target = _one(own, pick)
        box = self.client.sandboxes.get(own[target])
        done = box.revert(target, wait_for_ready=False)
        self._know(done.safety_snapshot.id, box.id)
        self.tree.sandboxes[box.id] = self.tree.snapshots[target]
        if done.sandbox.state is SandboxState.RUNNING:
            box.pause()

    @rule(pick=PICK)
    @precondition(lambda self: self.tree.sandboxes)
    def power(self, pick: int) -> None:
        """A paused one has its power cut, a stopped one is started and paused."""
        box = self._box(pick)
        if box.refresh().state is SandboxState.STOPPED:
            box.start(wait_for_ready=False)
            box.pause()
        else:
            box.stop(force=True)

    @rule(pick=PICK)
    @precondition(lambda self: self.tree.snapshots)
    def delete_snapshot(self, pick: int) -> None:
        snapshot = _one(self.tree.snapshots, pick)
        self.stored.wait_settled()  # a merge would remove what it has replaced, too
        taken = self.stored.taken()
        answer = self.client.snapshots.delete(snapshot)
        left = self.stored.taken().keys()
        del self.tree.snapshots[snapshot], self.tree.sources[snapshot]
        assert answer.freed_bytes == sum(taken[path] for path in taken.keys() - left)
        assert set(answer.kept_for) <= {self.root, *self.tree.sandboxes, *self.tree.snapshots}
        self._check()

    @rule(pick=PICK)
    @precondition(lambda self: self.tree.sandboxes)
    def delete_sandbox(self, pick: int) -> None:
        box = self._box(pick)
        box.delete()
        del self.tree.sandboxes[box.id]
        self._check()

    def teardown(self) -> None:
        """Take down the rest, one by one; then the space is what it was before the tree."""
        while self.tree.sandboxes or self.tree.snapshots:
            ids = [*self.tree.sandboxes, *self.tree.snapshots]
            middle = ids[len(ids) // 2]
            if middle in self.tree.sandboxes:
                self.client.sandboxes.delete(middle)
                del self.tree.sandboxes[middle]
            else:
                self.client.snapshots.delete(middle)
                del self.tree.snapshots[middle]
            self._check()
        self.stored.wait_settled()
        assert self.stored.bytes_on_disk() == self.space

    # Not rules

    def _box(self, pick: int) -> Sandbox:
        return self.client.sandboxes.get(_one(self.tree.sandboxes, pick))

    def _write(self, box: Sandbox, slot: int) -> None:
        """The guest itself finds what it must have, and changes one block."""
        if box.refresh().state is SandboxState.STOPPED:
            box.start()
        else:
            box.resume()
            self.client.sandboxes.wait_ready(box.id, timeout=120)
        self.number += 1
        result = box.execute(
            f"for slot in 0 1 2 3; do"
            f" dd if=/dev/vdb bs={BLOCK} skip=$slot count=1 iflag=direct 2>/dev/null | head -n 1;"
            f" done | tr -d '\\0';"
            f" echo {self.number}"
            f" | dd of=/dev/vdb bs={BLOCK} seek={slot} conv=sync,notrunc oflag=direct,dsync"
        ).check()
        content = list(self.tree.sandboxes[box.id])
        assert result.stdout_text.split() == [str(number) for number in content if number]
        content[slot] = self.number
        self.tree.sandboxes[box.id] = tuple(content)
        box.pause()

    def _restore(self, snapshot: str, content: Content) -> None:
        box = self.client.snapshots.restore(snapshot, wait_for_ready=False)
        box.pause()
        self.tree.sandboxes[box.id] = content

    def _know(self, snapshot: str, source: str) -> None:
        self.tree.snapshots[snapshot] = self.tree.sandboxes[source]
        self.tree.sources[snapshot] = source

    def _check(self) -> None:
        """Every survivor has its content, sealed layers never change, and nothing is left over."""
        for sandbox, content in self.tree.sandboxes.items():
            assert _content(self.stored.of_sandbox(sandbox, 1)) == content
        for snapshot, content in self.tree.snapshots.items():
            assert _content(self.stored.of_snapshot(snapshot, 1)) == content
        sealed = self.stored.sealed(but=self.ground)
        for name in sealed.keys() & self.seals.keys():
            assert sealed[name] == self.seals[name]
        self.seals |= sealed
        wait_until(lambda: not self.stored.unneeded())  # jobs sweep what they have replaced


def _one(things: Mapping[str, object], pick: int) -> str:
    """One of them; they are in the order in which they came."""
    ids = list(things)
    return ids[pick % len(ids)]


def _content(layer: Path) -> Content:
    whole = disks.read(layer, size=BLOCK * SLOTS)
    blocks = [whole[start : start + BLOCK] for start in range(0, len(whole), BLOCK)]
    return tuple(int(block.partition(b"\n")[0].rstrip(b"\0") or b"0") for block in blocks)


@pytest.fixture
def root(client: Client, tiny: Image) -> Iterator[str]:
    """The snapshot that every tree grows from."""
    with client.sandboxes.create(image=tiny.id, memory=128, data_disks=[1]) as box:
        snapshot = box.snapshot()
    yield snapshot.id
    client.snapshots.delete(snapshot.id)


def test_survivors_keep_their_content_and_space_comes_back(
    client: Client, shared_daemon: DaemonProcess, root: str
) -> None:
    stored = Stored(shared_daemon)
    stored.wait_settled()  # what other tests have left
    ground = stored.sealed()

    def machine() -> Deletes:
        return Deletes(client, stored, root, ground)

    run_state_machine_as_test(
        machine,  # type: ignore[arg-type]  # it takes any callable
        settings=settings(
            max_examples=4,
            stateful_step_count=18,
            deadline=None,
            database=None,
            # A tree is expensive; a failing one is told step by step as it is.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
    # Nothing that was there before has changed, and nothing has come to it.
    assert stored.sealed() == ground
