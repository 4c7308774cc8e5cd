"""The daemon dies at a commit of its catalog, or together with a guest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stratabox.client import DaemonUnavailableError, SandboxState, SnapshotState
from support.rig import Rig, rig

RUNNING, STOPPED = SandboxState.RUNNING, SandboxState.STOPPED
COMMITS = ("catalog.commit", "catalog.committed")


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("commits")) as made:
        yield made


@pytest.mark.parametrize("point", COMMITS)
@pytest.mark.parametrize("number", [2, 5, 9])
def test_killed_at_a_commit(failing: Rig, point: str, number: int) -> None:
    """Whichever transaction it is: before it is written, and after, when nobody was told."""
    failing.calm()
    mark = failing.mark()
    before = {snapshot.id for snapshot in failing.client.snapshots.list()}

    def work() -> None:
        while True:
            failing.client.snapshots.create(failing.witness.id, level="application")
            copies = failing.client.sandboxes.clone(
                failing.witness.id, quick=True, wait_for_ready=False
            )
            failing.client.snapshots.delete(copies.snapshot.id)
            failing.client.sandboxes.delete(copies.sandbox.id)

    try:
        failing.restart(f"{point}=kill:{number}")
    except AssertionError:
        assert not failing.process.runs  # one of the daemon's own, at its start
    else:
        with pytest.raises(DaemonUnavailableError):
            work()
        failing.process.wait_killed()
    failing.restart()
    for snapshot in failing.client.snapshots.list(states=[SnapshotState.READY]):
        if snapshot.id not in before:
            failing.expect(snapshot.id, mark)
    failing.check()
    failing.clear()


def test_killed_together_with_its_guest(failing: Rig) -> None:
    """What the guest wrote until it died is kept; nobody can say any more what the instant was."""
    failing.calm()
    victim = failing.create()
    layer = failing.layer_of(victim.id)
    failing.restart("snapshot.switched=kill")
    with pytest.raises(DaemonUnavailableError):
        failing.client.snapshots.create(victim.id, name="lost", quick=True)
    failing.process.wait_killed()
    failing.process.kill_guest(victim.id)
    failing.restart()
    failing.check()
    snapshot = failing.snapshot_named("lost")
    assert snapshot.state is SnapshotState.FAILED
    assert "QEMU ended" in str(snapshot.failure_reason)
    assert failing.client.sandboxes.get(victim.id).state is STOPPED
    assert failing.parent_of(failing.layer_of(victim.id)) == layer
    assert failing.client.sandboxes.start(victim.id, wait_for_ready=False).state is RUNNING
    failing.clear()
