"""`df`, the family tree, dry runs and what is kept, against a daemon of canned answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stratabox.v1 import host_pb2, records_pb2, sandboxes_pb2, snapshots_pb2

EVIL = "\x1b[31mname"


def with_space(message: Any, own: int, shared: int) -> Any:
    message.space.own_bytes, message.space.shared_bytes = own, shared
    message.space.logical_bytes = own + shared
    return message


def identity(number: int) -> str:
    return f"{number:08x}-2222-4333-8444-555555555555"


@pytest.fixture
def family(daemon: Any, make: Any) -> None:
    """box ─ a, b, c (on a, after a revert); copy, of b; gone, whose sandbox is no more."""
    shots = [("a", 1, ""), ("b", 2, "a"), ("c", 3, "a"), ("gone", 4, "")]
    ids = {name: identity(number) for name, number, _ in shots}
    box, copy, lost = identity(16), identity(17), identity(18)

    def at(message: Any, seconds: int, own: int = 0, shared: int = 0) -> Any:
        message.created_at.seconds = seconds
        return with_space(message, own, shared)

    snapshots = [
        at(
            make.snapshot(
                id=ids[name],
                name=name,
                source_sandbox_id=lost if name == "gone" else box,
                parent_snapshot_id=ids.get(parent, ""),
            ),
            1000 + number,
            number,
            100,
        )
        for name, number, parent in shots
    ]
    boxes = [
        # Reverted to a: what it stands on now is not where it comes from.
        at(make.sandbox(id=box, name=EVIL, source_snapshot_id=ids["a"]), 1000, 5, 6),
        at(make.sandbox(id=copy, name="copy", source_snapshot_id=ids["b"]), 1100),
        at(make.sandbox(id=identity(19), name="over", state=6, source_snapshot_id=""), 1),
    ]
    daemon.answers |= {
        "ListSnapshots": snapshots_pb2.ListSnapshotsResponse(snapshots=snapshots[::-1]),
        "ListSandboxes": sandboxes_pb2.ListSandboxesResponse(sandboxes=boxes),
    }


def names(node: dict[str, Any]) -> Any:
    return (
        {node["name"]: [names(child) for child in node["children"]]}
        if node["children"]
        else node["name"]
    )


@pytest.mark.usefixtures("family")
def test_the_tree_as_json(run: Any) -> None:
    roots = json.loads(run("sandbox", "snapshot", "list", "--tree", "--json").stdout)["tree"]
    assert [names(root) for root in roots] == [{EVIL: ["a", {"b": ["copy"]}, "c"]}, "gone"]
    assert roots[0]["children"][0]["space"] == {
        "logical_bytes": 101,
        "own_bytes": 1,
        "shared_bytes": 100,
    }


@pytest.mark.usefixtures("family")
def test_the_tree_as_text(run: Any) -> None:
    shown = run("snapshot", "list", "--tree").stdout
    assert shown.splitlines() == [
        "00000010  sandbox \\x1b[31mname (running) own 5 bytes, shared 6 bytes",
        "├── 00000001  snapshot a (application) own 1 bytes, shared 100 bytes",
        "├── 00000002  snapshot b (application) own 2 bytes, shared 100 bytes",
        "│   └── 00000011  sandbox copy (running) own 0 bytes, shared 0 bytes",
        "└── 00000003  snapshot c (application) on a own 3 bytes, shared 100 bytes",
        "00000004  snapshot gone (application) own 4 bytes, shared 100 bytes",
    ]


@pytest.mark.usefixtures("family")
def test_the_tree_is_whole(daemon: Any, run: Any) -> None:
    assert run("snapshot", "list", "--tree", "--limit", "3").exit_code == 2
    assert run("snapshot", "list", "--tree", "--session", "box").exit_code == 0
    assert daemon.last("ListSnapshots").sandbox == "box"


def test_a_dry_run(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers |= {
        "GetSnapshot": make.snapshot(),
        "DeleteSnapshot": snapshots_pb2.DeleteSnapshotResponse(
            id=make.snapshot_id, freed_bytes=4096
        ),
    }
    assert "would free 4.0 KiB" in run("snapshot", "delete", "x", "--dry-run").stdout
    assert daemon.last("DeleteSnapshot").dry_run
    assert json.loads(run("snapshot", "delete", "x", "--json").stdout)["deleted"] is True
    assert not daemon.last("DeleteSnapshot").dry_run


def test_df(daemon: Any, run: Any, make: Any) -> None:
    part = host_pb2.DiskUsagePart
    daemon.answers |= {
        "GetDiskUsage": host_pb2.DiskUsage(
            parts=[
                part(name="boot_files", bytes=1 << 20, files=3),
                part(name="work", bytes=0, files=0),
            ],
            total_bytes=1 << 20,
            budget_used_bytes=1 << 19,
            budget_bytes=1 << 21,
            filesystem_bytes=1000,
            filesystem_free_bytes=250,
            high_water_percent=97,
        ),
        "ListSandboxes": sandboxes_pb2.ListSandboxesResponse(),
        "ListSnapshots": snapshots_pb2.ListSnapshotsResponse(
            snapshots=[
                with_space(make.snapshot(name="small"), 1, 9),
                with_space(make.snapshot(name="large"), 1 << 30, 0),
            ]
        ),
    }
    shown = run("df").stdout
    assert "boot files  1.0 MiB  3" in shown
    assert "work" not in shown
    assert "total       1.0 MiB  3" in shown
    assert "512.0 KiB of the budget of 2.0 MiB" in shown
    assert "75.0 % full, 250 bytes free" in shown
    assert "97 %" in shown
    body = json.loads(run("df", "--json").stdout)
    assert body["usage"]["parts"][0] == {"name": "boot_files", "bytes": 1 << 20, "files": 3}
    assert list(body) == ["usage"]


def test_what_is_kept_of_a_sandbox(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers |= {"CreateSandbox": make.sandbox(), "UpdateSandbox": make.sandbox()}
    words = "--keep-last 5 --snapshot-every 1h30m --snapshot-level crash --on-timeout snapshot"
    assert run("sandbox", "create", *words.split()).exit_code == 0
    sent = daemon.last("CreateSandbox")
    assert (sent.keep_last, sent.snapshot_schedule.every.seconds) == (5, 5400)
    assert sent.snapshot_schedule.level == records_pb2.SNAPSHOT_LEVEL_CRASH
    assert sent.on_timeout == records_pb2.TIMEOUT_ACTION_SNAPSHOT
    assert run("sandbox", "update", "x", "--snapshot-every", "1h").exit_code == 0
    sent = daemon.last("UpdateSandbox")
    assert list(sent.update_mask.paths) == ["snapshot_schedule"]
    assert sent.sandbox.snapshot_schedule.every.seconds == 3600
    words = "--no-snapshot-schedule --keep-last 0 --no-expiry"
    assert run("sandbox", "update", "x", *words.split()).exit_code == 0
    sent = daemon.last("UpdateSandbox")
    assert set(sent.update_mask.paths) == {"snapshot_schedule", "keep_last", "expires_at"}
    assert not sent.sandbox.HasField("snapshot_schedule")


@pytest.mark.parametrize(
    "words",
    [
        "--snapshot-level crash",
        "--snapshot-every 1h --no-snapshot-schedule",
        "--no-expiry --timeout 1h",
        "--keep-last -1",
    ],
)
def test_what_contradicts_itself(run: Any, words: str) -> None:
    assert run("sandbox", "update", "x", *words.split()).exit_code == 2
