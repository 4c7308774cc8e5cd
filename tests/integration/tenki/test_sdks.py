"""Tenki's published SDKs, unmodified, with nothing set but where the daemon is and a key."""

from __future__ import annotations

from pathlib import Path

from stratabox.client import Client
from stratabox.tenki.v1 import records_pb2, sandbox_pb2
from support.tenki import Tenki
from support.tenki_sdks import run_node, run_python


def test_the_python_sdk_through_the_whole_life(tenki: Tenki, tmp_path: Path) -> None:
    run_python(tenki, "life.py", str(tmp_path))
    assert (tmp_path / "downloaded.sbx").stat().st_size > 0


def test_the_python_sdk_with_asyncio(tenki: Tenki, session: records_pb2.SandboxSession) -> None:
    with Client(tenki.process.address) as client:
        snapshot = client.sandboxes.snapshot(session.id, level="memory")
        run_python(tenki, "life_aio.py", snapshot.id)
        client.snapshots.delete(snapshot.id)


def test_the_typescript_sdk_through_the_whole_life(tenki: Tenki) -> None:
    run_node(tenki, "life.mjs")


def test_the_lists_that_the_sdks_do_not_ask_for(
    tenki: Tenki, session: records_pb2.SandboxSession
) -> None:
    sessions = tenki.call("ListSessions", sandbox_pb2.ListSessionsRequest()).sessions
    assert session.id in {each.id for each in sessions}
    with Client(tenki.process.address) as client:
        snapshot = client.sandboxes.snapshot(session.id, level="crash")
        request = sandbox_pb2.ListSnapshotsRequest(page_size=1)
        (found,) = tenki.call("ListSnapshots", request).snapshots
        assert (found.id, found.session_id) == (snapshot.id, session.id)
        assert found.restore_mode == "COLD_BOOT"
        client.snapshots.delete(snapshot.id)
