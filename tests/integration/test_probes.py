"""Readiness probes on real guests: passing late, failing, killed, inherited."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from stratabox.client import (
    Client,
    Image,
    InvalidArgumentError,
    ProbeFailedError,
    ReadinessProbe,
    Sandbox,
    SandboxRecord,
    Snapshot,
    SnapshotLevel,
)
from stratabox.daemon.hypervisor.guest import checks
from support.bench import Running, make_bench, running
from support.daemon import DaemonProcess
from support.waiting import until

Shell = Callable[[Sandbox, str], str]

QUICK = timedelta(milliseconds=200)
NONE = ReadinessProbe()


@pytest.fixture(scope="module")
def base(client: Client, tiny: Image) -> Iterator[Snapshot]:
    """A guest's memory whose probe wants a file that is not there; restored in a moment."""
    probe = ReadinessProbe(command="test -e /go", interval=QUICK)
    box = client.sandboxes.create(
        image=tiny.id, memory=128, readiness_probe=probe, wait_for_ready=False
    )
    answering(client, box)
    shot = box.snapshot(level=SnapshotLevel.MEMORY)
    box.delete()
    yield shot
    client.snapshots.delete(shot.id)


def answering(client: Client, box: Sandbox) -> SandboxRecord:
    """Its agent has answered, and its probe has not passed."""
    record = until(client, box.id, lambda one: "probe" in (one.state_reason or ""))
    assert not record.ready
    return record


def test_a_probe_that_passes_late(client: Client, base: Snapshot, sh: Shell) -> None:
    assert base.readiness_probe == ReadinessProbe(command="test -e /go", interval=QUICK)
    with client.snapshots.restore(base.id, wait_for_ready=False) as box:
        assert box.readiness_probe == base.readiness_probe
        assert "test -e /go" in (answering(client, box).state_reason or "")
        # Its agent has answered: it can be worked with, so that one can look why.
        sh(box, "touch /go")
        record = until(client, box.id, lambda one: one.ready)
        assert record.state_reason is None
        assert record.ready_at is not None
        # Once it is ready it stays so: a probe says when to begin, and nothing after that.
        sh(box, "rm /go")
        box.pause()
        assert box.resume().ready


def test_a_probe_that_fails(client: Client, base: Snapshot) -> None:
    line = "echo so far; echo no luck >&2; exit 3"
    failing = ReadinessProbe(command=line, interval=QUICK, start_period=timedelta(0))
    before = {box.id for box in client.sandboxes.list()}
    with pytest.raises(ProbeFailedError, match="exited with code 3: no luck") as caught:
        client.snapshots.restore(base.id, readiness_probe=failing)
    assert caught.value.reason == "PROBE_FAILED"
    assert "no luck" in caught.value.metadata["failure"]
    assert {box.id for box in client.sandboxes.list()} == before  # nothing is left of it


def test_a_start_period_that_is_over(client: Client, base: Snapshot, sh: Shell) -> None:
    probe = ReadinessProbe(
        command=("/bin/sh", "-c", "printf '\\033[31mno\\n'; test -e /go"),
        interval=QUICK,
        start_period=timedelta(seconds=1),
    )
    with pytest.raises(ProbeFailedError, match=r"within 1 s.*\\x1b\[31mno") as caught:
        client.snapshots.restore(base.id, readiness_probe=probe)
    assert "\x1b" not in caught.value.message
    with client.snapshots.restore(base.id, readiness_probe=probe, wait_for_ready=False) as box:
        record = until(client, box.id, lambda one: "within 1 s" in (one.state_reason or ""))
        assert not record.ready
        # It is tried on, and may still pass.
        sh(box, "touch /go")
        assert until(client, box.id, lambda one: one.ready).state_reason is None


def test_a_probe_that_hangs_is_killed(client: Client, base: Snapshot, sh: Shell) -> None:
    probe = ReadinessProbe(
        command="echo begun; sleep 4321", interval=QUICK, timeout=timedelta(seconds=1),
        start_period=timedelta(0),
    )  # fmt: skip
    with client.snapshots.restore(base.id, readiness_probe=probe, wait_for_ready=False) as box:
        until(client, box.id, lambda one: "killed after 1 s: begun" in (one.state_reason or ""))
        # Another one rules from the next start on.
        assert client.sandboxes.update(box.id, readiness_probe=None).readiness_probe is None
        box.stop(force=True)
        other = ReadinessProbe(port=22)
        assert box.start(readiness_probe=other, wait_for_ready=False).readiness_probe == other
        assert client.sandboxes.get(box.id).readiness_probe == other


def test_ports_and_http(client: Client, base: Snapshot, sh: Shell) -> None:
    port = ReadinessProbe(port=8080, interval=QUICK)
    with client.snapshots.restore(base.id, readiness_probe=port, wait_for_ready=False) as box:
        answering(client, box)
        impatient = ReadinessProbe(port=8080, start_period=timedelta(0))
        with pytest.raises(ProbeFailedError, match="port 8080"):
            client.snapshots.restore(base.id, readiness_probe=impatient)
        sh(box, "httpd -p 127.0.0.1:8080 -h /tmp")
        assert until(client, box.id, lambda one: one.ready)
    http = ReadinessProbe(port=8080, path="/health?full=1", interval=QUICK)
    with client.snapshots.restore(base.id, readiness_probe=http, wait_for_ready=False) as box:
        answering(client, box)
        sh(box, "httpd -p 127.0.0.1:8080 -h /tmp")
        shot = box.snapshot(level=SnapshotLevel.MEMORY)
        assert shot.readiness_probe == http
        impatient = ReadinessProbe(port=8080, path=http.path, start_period=timedelta(0))
        with pytest.raises(ProbeFailedError, match="status 404"):
            client.snapshots.restore(shot.id, readiness_probe=impatient)
        sh(box, "touch /tmp/health")
        assert until(client, box.id, lambda one: one.ready)
        # A clone is tried anew, and at once.
        (copy,) = client.sandboxes.clone(box.id).sandboxes
        assert copy.ready
        copy.delete()
        client.snapshots.delete(shot.id)
    none = client.snapshots.restore(base.id, readiness_probe=NONE)
    assert none.ready
    assert none.readiness_probe is None
    none.delete()


def test_what_cannot_be(client: Client, base: Snapshot) -> None:
    for probe in (
        ReadinessProbe(port=70000),
        ReadinessProbe(port=80, path="no-slash"),
        ReadinessProbe(port=80, path="/new\r\nline: x"),
        ReadinessProbe(command=("",)),
        ReadinessProbe(command="true", port=80),
        ReadinessProbe(path="/"),
        ReadinessProbe(command="true", interval=timedelta(milliseconds=1)),
        ReadinessProbe(command="true", timeout=timedelta(hours=2)),
        ReadinessProbe(command="true", start_period=timedelta(days=2)),
        ReadinessProbe(command="x" * 40_000),
    ):
        with pytest.raises(InvalidArgumentError):
            client.snapshots.restore(base.id, readiness_probe=probe)


def test_a_restarted_daemon_tries_on(own_daemon: DaemonProcess, sh: Shell) -> None:
    client = own_daemon.start()
    client.images.build_tiny()
    words = ["create", "--image", "tiny", "--memory", "128", "--no-wait", "--json"]
    made = subprocess.run(
        [sys.executable, "-m", "stratabox.client.cli", "--address", own_daemon.address,
         "sandbox", *words, "--ready-cmd", "test -e /go", "--ready-interval", "200ms",
         "--ready-start-period", "1h"],
        capture_output=True, check=True,
    )  # fmt: skip
    box = client.sandboxes.get(json.loads(made.stdout)["id"])
    answering(client, box)
    own_daemon.kill()
    client.close()
    client = own_daemon.start()
    box = client.sandboxes.get(box.id)
    assert not answering(client, box).ready
    sh(box, "touch /go")
    assert until(client, box.id, lambda one: one.ready)
    sh(box, "rm /go")
    own_daemon.kill()
    client.close()
    # One that was ready is so: it has passed.
    client = own_daemon.start()
    box = client.sandboxes.get(box.id)
    assert box.ready
    assert client.sandboxes.wait_ready(box.id, timeout=30).ready
    client.close()


@pytest.fixture
async def bare(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """A tiny guest by itself: nothing but its agent."""
    root: Path = tmp_path_factory.mktemp("checks")
    bench = await make_bench(root)
    async with running(bench.launcher, await bench.spec()) as guest:
        yield guest
    await asyncio.to_thread(shutil.rmtree, root)


async def test_checks_without_sshd(bare: Running) -> None:
    async def status(path: str) -> str:
        return await checks.http_status_line(bare.agent, 8080, path, 3)

    assert not await checks.port_listens(bare.agent, 8080, 60)
    assert await status("/") == ""
    await bare.sh("mkdir /web; touch '/web/a b'; httpd -p 127.0.0.1:8080 -h /web")
    assert await checks.port_listens(bare.agent, 8080, 60)
    assert not await checks.port_listens(bare.agent, 808, 60)
    assert " 200 " in await status("/a%20b")
    assert " 404 " in await status("/$(reboot)")
