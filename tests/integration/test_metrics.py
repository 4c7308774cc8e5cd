"""Metrics move with what guests do, and cost the guests nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from stratabox.client import (
    AsyncClient,
    Client,
    InvalidArgumentError,
    Sandbox,
    SandboxMetrics,
    SandboxNotFoundError,
    SandboxState,
)
from support.daemon import DaemonProcess
from support.rig import age_of, eventually
from support.waiting import killed_at_last

Shell = Callable[[Sandbox, str], str]
MIB = 1 << 20


def of(client: Client, sandbox: str) -> Iterator[SandboxMetrics]:
    """One sandbox's metrics, again and again."""
    for sample in client.sandboxes.watch_metrics([sandbox], interval=0.2):
        (one,) = sample.sandboxes
        yield one


def test_what_a_guest_uses(
    shared_daemon: DaemonProcess, client: Client, module_box: Sandbox, sh: Shell
) -> None:
    pid = shared_daemon.guests()[module_box.id]
    at_least = age_of(pid)
    before = module_box.metrics()
    assert (before.sandbox_id, before.name) == (module_box.id, module_box.name)
    assert (before.state, before.cpus, before.memory) == (SandboxState.RUNNING, 1, 256)
    assert before.process is not None
    assert before.process.cpu_share is not None
    assert at_least < before.process.uptime.total_seconds() < age_of(pid)
    status = Path(f"/proc/{pid}/status").read_text()
    rss = int(status.split("VmRSS:")[1].split()[0]) << 10
    assert abs(before.process.rss_bytes - rss) < 64 * MIB
    private, pss = before.process.private_bytes, before.process.pss_bytes
    assert private is not None
    assert pss is not None
    assert 0 < private <= pss <= rss + 64 * MIB
    (disk,) = before.disks
    assert disk.device == "disk0"
    assert disk.read_operations > 0

    sh(module_box, "dd if=/dev/urandom of=/big bs=1M count=8 conv=fsync 2>/dev/null")
    sh(module_box, "sync; echo 3 >/proc/sys/vm/drop_caches; cat /big >/dev/null; rm /big")
    after = module_box.metrics()
    assert after.process is not None
    assert after.process.cpu_time > before.process.cpu_time
    assert after.process.uptime > before.process.uptime
    assert after.disks[0].written_bytes >= disk.written_bytes + 8 * MIB
    assert after.disks[0].read_bytes >= disk.read_bytes + 8 * MIB
    assert after.disks[0].write_operations > disk.write_operations
    assert after.disks[0].flush_operations > disk.flush_operations
    assert after.own_bytes >= before.own_bytes + 8 * MIB
    assert after.network.sent_bytes == 0  # it has no way out


def test_the_share_follows_the_load(client: Client, module_box: Sandbox, sh: Shell) -> None:
    sh(module_box, "(while :; do :; done) >/dev/null 2>&1 & echo $! >/tmp/busy")
    samples = of(client, module_box.id)
    first = next(samples)
    assert first.process is not None
    assert first.process.cpu_share is None  # nothing to compare with yet

    def share() -> float:
        process = next(samples).process
        assert process is not None
        return process.cpu_share or 0

    # Other guests on this host may leave it little, now and then.
    eventually(lambda: share() > 0.2)
    sh(module_box, "kill $(cat /tmp/busy)")
    eventually(lambda: share() < 0.1)
    samples.close()  # type: ignore[attr-defined]


def test_everything_that_has_a_process(
    shared_daemon: DaemonProcess, client: Client, module_box: Sandbox
) -> None:
    with client.sandboxes.clone(module_box.id, name="zz-copy").sandboxes[0] as copy:
        samples = client.sandboxes.watch_metrics(interval=0.2)
        assert {one.sandbox_id for one in next(samples).sandboxes} == {module_box.id, copy.id}
        copy.pause()
        paused = client.sandboxes.metrics(copy.id)
        assert paused.state is SandboxState.PAUSED
        assert paused.process is not None
        copy.pause(to_disk=True)
        parked = client.sandboxes.metrics(copy.id)
        assert (parked.state, parked.process, parked.disks) == (SandboxState.PAUSED, None, ())
        assert parked.own_bytes > 0
        # The stream goes on without it.
        for sample in samples:
            if {one.sandbox_id for one in sample.sandboxes} == {module_box.id}:
                break
        copy.resume()
        again = client.sandboxes.metrics(copy.id)
        assert again.process is not None  # a new one, whose counters begin anew
        assert again.process.uptime < timedelta(minutes=5)
        named = client.sandboxes.watch_metrics([copy.id], interval=0.2)
        assert len(next(named).sandboxes) == 1
    for sample in named:  # deleted: it is left out, and the stream goes on
        if not sample.sandboxes:
            break
    for stream in (named, samples):
        stream.close()  # type: ignore[attr-defined]


def test_what_cannot_be_asked_for(client: Client, module_box: Sandbox) -> None:
    with pytest.raises(SandboxNotFoundError):
        client.sandboxes.metrics("no-such-sandbox")
    for interval in (0.1, 7200):
        with pytest.raises(InvalidArgumentError, match="interval"):
            next(client.sandboxes.watch_metrics(interval=interval))
    with pytest.raises(SandboxNotFoundError):
        next(client.sandboxes.watch_metrics(["no-such-sandbox"]))


async def test_the_same_awaited(shared_daemon: DaemonProcess, module_box: Sandbox) -> None:
    async with AsyncClient(shared_daemon.address) as client:
        one = await client.sandboxes.metrics(module_box.id)
        assert one.sandbox_id == module_box.id
        box = await client.sandboxes.get(module_box.id)
        assert (await box.metrics()).process is not None
        assert (await box.console_log()) != b""


def test_on_the_command_line(shared_daemon: DaemonProcess, module_box: Sandbox) -> None:
    command = [sys.executable, "-m", "stratabox.client.cli", "--address", shared_daemon.address]

    def run(*words: str) -> str:
        done = subprocess.run(
            [*command, "sandbox", *words], capture_output=True, check=True, text=True
        )
        return done.stdout

    (one,) = json.loads(run("top", "--once", "--json"))["sandboxes"]
    assert one["sandbox_id"] == module_box.id
    assert json.loads(run("metrics", module_box.id, "--json"))["process"]["cpu_share"] >= 0
    header, row = run("top", "--once").splitlines()
    assert header.split()[:3] == ["NAME", "STATE", "CPU"]
    assert row.split()[0] == module_box.name
    assert "MiB" in run("metrics", module_box.id)
    following = [*command, "sandbox", "top", "--interval", "200ms", "--json"]
    with killed_at_last(subprocess.Popen(following, stdout=subprocess.PIPE)) as top:
        assert top.stdout is not None
        lines = [json.loads(top.stdout.readline()) for _ in range(2)]
    assert lines[0]["time"] < lines[1]["time"]
    assert lines[1]["sandboxes"][0]["process"]["cpu_share"] is not None
