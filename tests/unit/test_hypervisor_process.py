"""Processes found again, events put into words, the accelerator chosen by looking."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor import accelerator, events, process, qemu_host, sockets
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError
from stratabox.storage.model.ids import SandboxId, mint

CPUS = "processor: 0\nflags\t\t: fpu vme {}\n"


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(CPUS.format("svm"))
    return path


async def test_a_cpu_without_the_feature_is_never_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def probe(seconds: float = 0) -> str | None:
        raise AssertionError("probed")

    monkeypatch.setattr(accelerator, "run_probe", probe)
    plain = tmp_path / "cpuinfo"
    plain.write_text(CPUS.format("sse2"))
    obstacle = await accelerator.find_obstacle(cpuinfo=plain, device=Path("/dev/null"))
    assert obstacle is not None
    assert "vmx" in obstacle


async def test_a_device_that_opens_is_not_enough(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def probe(seconds: float = 0) -> str | None:
        return "it hangs"

    monkeypatch.setattr(accelerator, "run_probe", probe)
    obstacle = await accelerator.find_obstacle(cpuinfo=cpuinfo, device=Path("/dev/null"))
    assert obstacle == "it hangs"


async def test_a_probe_that_hangs_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "hangs.py"
    program.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(accelerator, "_PROBE", program)
    obstacle = await accelerator.run_probe(0.2)
    assert obstacle is not None
    assert "did not end" in obstacle


async def test_wanting_kvm_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def obstacle() -> str | None:
        return "there is none"

    monkeypatch.setattr(accelerator, "find_obstacle", obstacle)
    with pytest.raises(DeniedError) as raised:
        await accelerator.choose("kvm")
    assert raised.value.reason == "KVM_UNUSABLE"
    chosen = await accelerator.choose("auto")
    assert (chosen.name, "there is none" in chosen.reason) == ("tcg", True)
    with pytest.raises(InvalidArgumentError):
        await accelerator.choose("xen")


async def test_a_missing_qemu_is_named_with_its_package() -> None:
    with pytest.raises(DeniedError, match="qemu-system-x86") as raised:
        await qemu_host.probe("qemu-system-nowhere")
    assert raised.value.reason == "TOOL_MISSING"


def test_made_up_addresses_are_qemus() -> None:
    assert qemu_host.random_mac().startswith("52:54:00:")
    assert qemu_host.random_mac() != qemu_host.random_mac()


def _sleeper(*arguments: str) -> subprocess.Popen[bytes]:
    program = "import time; print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    child.returncode = 0  # reaped by `process`, as the launcher does it
    return child


async def test_a_process_is_found_again_watched_and_ended() -> None:
    store, sandbox = mint(), SandboxId(mint())  # others may run this test on the same host
    child = _sleeper("-name", f"guest={process.guest_name(store, sandbox)},debug-threads=on")
    (found,) = process.find_all(store)
    assert (found.sandbox, found.pid) == (sandbox, child.pid)
    assert process.find_all(f"{store}2") == []
    with process.opened(found.pid, found.started + 1) as pidfd:
        assert pidfd is None  # the same pid, another process
    with process.opened(found.pid, found.started) as pidfd:
        assert pidfd is not None
        gone = asyncio.ensure_future(process.wait_gone(pidfd))
        await process.kill(found.pid, found.started)
        await gone
    assert process.reap(found.pid, found.started) == -signal.SIGKILL
    assert process.reap(found.pid, found.started) == -signal.SIGKILL
    assert process.start_time(found.pid) is None
    await process.kill(found.pid, found.started)


def test_a_name_anywhere_else_is_not_a_domain() -> None:
    store = mint()
    name = f"guest={process.guest_name(store, SandboxId(mint()))}"
    child = _sleeper("--", name)
    try:
        assert process.find_all(store) == []
    finally:
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)


def test_sockets_in_deep_folders(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 40)
    folder.mkdir()
    (folder / sockets.MONITOR).touch()  # an old one
    with sockets.listen(folder, sockets.MONITOR), sockets.connect(folder, sockets.MONITOR):
        assert (folder / sockets.MONITOR).stat().st_mode & 0o777 == 0o600
    sockets.remove(folder)
    sockets.remove(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (
            {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}},
            events.Shutdown(True, "guest-shutdown"),
        ),
        (
            {"event": "VSERPORT_CHANGE", "data": {"id": "agent-port", "open": True}},
            events.AgentPort(True),
        ),
        ({"event": "VSERPORT_CHANGE", "data": {"id": "other", "open": True}}, None),
        ({"event": "NETDEV_STREAM_CONNECTED", "data": {"netdev-id": "net"}}, events.Wired(True)),
        (
            {"event": "NETDEV_STREAM_DISCONNECTED", "data": {"netdev-id": "net"}},
            events.Wired(False),
        ),
        (
            {
                "event": "BLOCK_IO_ERROR",
                "data": {
                    "node-name": "L1",
                    "nospace": True,
                    "action": "stop",
                    "operation": "write",
                    "reason": "No space left on device",
                },
            },
            events.BlockError("L1", True, "stop", "write: No space left on device"),
        ),
        ({"event": "STOP"}, events.Stopped()),
        ({"event": "GUEST_PANICKED", "data": {}}, events.Panicked()),
        ({"event": "RTC_CHANGE", "data": None}, None),
    ],
)
def test_events(message: dict[str, object], event: events.Event | None) -> None:
    assert events.parse(message) == event


@pytest.mark.parametrize(
    ("shutdown", "panicked", "words"),
    [
        (events.Shutdown(True, "guest-shutdown"), False, "powered itself off"),
        (events.Shutdown(False, "host-qmp-quit"), False, "plug was pulled"),
        (None, True, "kernel panicked"),
        (None, False, "exited with code 1. Its last words: no memory"),
    ],
)
def test_ends_in_words(shutdown: events.Shutdown | None, panicked: bool, words: str) -> None:
    reason = events.describe_end(
        shutdown, panicked=panicked, ended=process.describe(1), last_words="no memory"
    )
    assert words in reason


def test_guest_text_cannot_steer_a_terminal() -> None:
    assert process.printable("a\x1b[2Jb\r\nc\x00") == "a\\x1b[2Jb\nc\\x00"
