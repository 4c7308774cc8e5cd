"""Another version is installed while clients are at work."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from installed import load
from installed import package as packages
from installed.container import Container
from installed.guests import qemu, restored, scopes
from installed.package import Package
from stratabox.client import SnapshotState, UnavailableError
from support import counting


def test_upgraded_and_downgraded_under_load(
    lab: Container, package: Package, tmp_path: Path
) -> None:
    """Guests run on, what was acknowledged is there, and calls that break off say why."""
    newer = packages.with_version(package, "9.0.0", tmp_path)
    with lab.client() as client:
        boxes = (restored(client, "one"), restored(client, "two"))
        before = [(qemu(lab, box.id), *counting.now(box)[:2]) for box in boxes]
        with load.at_work(client, boxes) as calls:
            for target in (newer, package):
                calls.wait_more(3)
                daemon = lab.daemon_pid()
                lab.sh(f"apt-get install --yes --allow-downgrades {lab.put(target.file)}")
                assert client.host().version == target.version
                assert lab.daemon_pid() not in (0, daemon)
                calls.wait_more(3)
        assert [(qemu(lab, box.id), *counting.wait_on(box)[:2]) for box in boxes] == before
        assert len(calls.snapshots) == calls.answered["snapshot"]
        for snapshot in calls.snapshots:
            assert client.snapshots.get(snapshot).state is SnapshotState.READY
        last = client.snapshots.restore(calls.snapshots[-1], name="last")
        assert last.execute("true", timeout=60).exit_code == 0
        last.delete()
        print(f"{calls.answered}; broken off: {Counter(kind for kind, _ in calls.broken)}")
        for _, error in calls.broken:
            print(f"{type(error).__name__}: {error}")
        assert all(isinstance(error, UnavailableError) for _, error in calls.broken)
        left = {box.id for box in client.sandboxes.list()}
        # A copy whose call was broken off is there or not; none is there by half.
        copies = [box for box in client.sandboxes.list() if box.id not in {b.id for b in boxes}]
        assert len(copies) <= sum(kind == "clone" for kind, _ in calls.broken)
        assert {box_of(each) for each in scopes(lab)} == left
    assert "dpkg" not in lab.sh("dpkg --audit")
    said = lab.sh("stratabox --address unix:///run/stratabox/api.sock check")
    print(said)


def box_of(scope: str) -> str:
    """The sandbox that a scope belongs to: stratabox-guest-ID-PID.scope."""
    return scope.removesuffix(".scope").split("-", 2)[2].rpartition("-")[0]
