"""The main job, end to end, on the tiny guest."""

from __future__ import annotations

from collections.abc import Callable

from stratabox.client import Client, Image, Sandbox, SandboxState, SnapshotLevel, SnapshotState

Shell = Callable[[Sandbox, str], str]


def test_create_work_snapshot_restore_clone_delete(client: Client, tiny: Image, sh: Shell) -> None:
    with client.sandboxes.create(image=tiny.id, memory=256, name="debugbox") as box:
        assert (box.state, box.ready, box.name) == (SandboxState.RUNNING, True, "debugbox")
        sh(box, "echo before > /notes && sync")
        baseline = box.snapshot(name="baseline")
        assert baseline.state is SnapshotState.READY
        assert baseline.consistency is SnapshotLevel.APPLICATION
        assert baseline.frozen_filesystems == 1
        sh(box, "echo after > /notes && sync")
        quick = box.snapshot(quick=True)
        assert quick.consistency is SnapshotLevel.CRASH
        assert quick.parent_snapshot_id == baseline.id
        with client.snapshots.restore(baseline.id, name="restored-copy") as restored:
            assert sh(restored, "cat /notes") == "before"
            assert restored.source_snapshot_id == baseline.id
        clones = box.clone(name="worker", count=2)
        assert [copy.name for copy in clones.sandboxes] == ["worker-1", "worker-2"]
        for copy in clones.sandboxes:
            assert sh(copy, "cat /notes") == "after"
            copy.delete()
        assert sh(box, "cat /notes") == "after"
    for snapshot in (baseline, quick, clones.snapshot):
        client.snapshots.delete(snapshot.id)
