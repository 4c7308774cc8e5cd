"""The doctor on how the daemon is installed and run, and on what the kernel holds it by."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import pytest

from stratabox.daemon.config import Config, load
from stratabox.daemon.doctor import kernel, service
from stratabox.daemon.doctor.finding import Finding, Status
from stratabox.daemon.rpc import asking
from stratabox.v1 import host_pb2

SHOWN = """\
Id=strataboxd.service
LoadState=loaded
ActiveState={service}
FragmentPath=/usr/lib/systemd/system/strataboxd.service
UnitFileState=enabled
TasksCurrent=12

Id=strataboxd.socket
LoadState=loaded
ActiveState={socket}
FragmentPath=/usr/lib/systemd/system/strataboxd.socket
UnitFileState={enabled}
TasksCurrent=[not set]

Id=stratabox.slice
LoadState={slice}
ActiveState=active
FragmentPath=/usr/lib/systemd/system/stratabox.slice
UnitFileState=static
TasksCurrent=31
"""


def config(*argv: str) -> Config:
    return load(argv, {"HOME": "/home/ann"})


def judged(*, root: bool = True, **words: str) -> Finding:
    usual = {"service": "active", "socket": "active", "enabled": "enabled", "slice": "loaded"}
    return service.judge_units(service.parse_units(SHOWN.format(**{**usual, **words})), root=root)


def test_units_that_are_as_they_should_be() -> None:
    found = judged()
    assert found.status is Status.OK
    assert found.detail == (
        "strataboxd.service enabled, active; strataboxd.socket enabled, active;"
        " stratabox.slice active with 31 threads of guests"
    )


@pytest.mark.parametrize(
    ("words", "status", "detail", "remedy"),
    [
        ({"socket": "inactive"}, Status.WARN, "socket enabled, inactive", "enable --now"),
        ({"service": "failed"}, Status.FAIL, "service enabled, failed", "journalctl -u"),
        ({"enabled": "disabled"}, Status.WARN, "disabled, active", "after a reboot"),
        ({"slice": "not-found"}, Status.WARN, "stratabox.slice is not installed", "daemon-reload"),
        ({"slice": "masked"}, Status.WARN, "stratabox.slice is masked", "unmask stratabox.slice"),
    ],
)
def test_units_that_are_not(
    words: dict[str, str], status: Status, detail: str, remedy: str
) -> None:
    found = judged(root=True, **words)
    assert found.status is status
    assert detail in found.detail
    assert remedy in found.remedy


def test_a_user_mends_units_of_their_own() -> None:
    assert judged(root=False, socket="inactive").remedy.startswith("systemctl --user enable")
    assert "enable-linger" in service.judge_units({}, root=False).remedy
    none = SHOWN.replace("loaded", "not-found")
    usual = {"service": "inactive", "socket": "inactive", "enabled": "", "slice": "not-found"}
    found = service.judge_units(service.parse_units(none.format(**usual)), root=False)
    assert (found.status, "no limits" in found.detail) == (Status.WARN, True)


@pytest.mark.parametrize(
    ("packaged", "place", "status", "words"),
    [
        ("", "/srv/src/daemon/stratabox/daemon", Status.OK, "from the sources in /srv/src"),
        (
            "ii 9.9",
            "/srv/src/daemon/stratabox/daemon",
            Status.WARN,
            "package 9.9 is",
        ),
        ("ii 9.9", "/usr/lib/stratabox/lib/python3.11/site-packages", Status.WARN, "says 9.9"),
        ("rc 9.9", "/usr/lib/stratabox/lib/python3.11/site-packages", Status.OK, "Debian package"),
    ],
)
def test_ways_of_installing(
    monkeypatch: pytest.MonkeyPatch, packaged: str, place: str, status: Status, words: str
) -> None:
    monkeypatch.setattr(service, "output_of", lambda *_: packaged)
    monkeypatch.setattr(service, "_PACKAGE", Path(place))
    (found,) = service.check_package(config())
    assert found.status is status
    assert words in found.detail


@contextmanager
def answering(path: Path, **fields: Any) -> Iterator[Config]:
    """A daemon that says this."""
    answer = host_pb2.Host(pid=7, launcher="qemu", **fields)
    asked = grpc.unary_unary_rpc_method_handler(
        lambda request, context: answer,
        request_deserializer=host_pb2.GetHostRequest.FromString,
        response_serializer=host_pb2.Host.SerializeToString,
    )
    service = grpc.method_handlers_generic_handler("stratabox.v1.HostService", {"GetHost": asked})
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((service,))
    assert server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield config("--address", f"unix://{path}")
    finally:
        server.stop(None).wait()


@pytest.fixture
def socket(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(service, "SYSTEMD_RUNS", Path("/nonexistent"))
    monkeypatch.setattr(asking, "_SECONDS", 60)
    monkeypatch.chdir(tmp_path_factory.mktemp("d"))
    return Path.cwd() / "s"


def test_an_older_daemon_runs_on(socket: Path) -> None:
    with answering(socket, version="0.0.1", limits_reason="no controller cpu") as asked:
        daemon, limits = service.check_daemon(asked)
    assert daemon.status is limits.status is Status.WARN
    assert f"0.0.1 runs (pid 7, launcher qemu); installed is {metadata.version('stratabox')}" in (
        daemon.detail
    )
    assert "guests run on" in daemon.remedy
    assert limits.detail == "none: no controller cpu"


def test_the_daemon_that_runs_is_this(socket: Path) -> None:
    here = metadata.version("stratabox")
    with answering(socket, version=here, limits=["cpu", "memory"], limits_by="systemd") as asked:
        found = list(service.check_daemon(asked))
    assert [each.status for each in found] == [Status.OK, Status.OK]
    assert found[1].detail == "cpu, memory by systemd"


def test_nobody_answers(socket: Path) -> None:
    (found,) = service.check_daemon(config("--address", f"unix://{socket}"))
    assert found.detail.startswith("none was asked")
    socket.touch()
    (found,) = service.check_daemon(config("--address", f"unix://{socket}"))
    assert "nobody answers" in found.detail


def test_a_daemon_that_waits_for_a_call_is_not_started(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket.touch()
    monkeypatch.setattr(service, "SYSTEMD_RUNS", socket)
    shown = SHOWN.format(service="inactive", socket="active", enabled="enabled", slice="loaded")
    monkeypatch.setattr(service, "output_of", lambda *_: shown)
    (found,) = service.check_daemon(config("--address", f"unix://{socket}"))
    assert found.detail == "it is started by the first call"


@pytest.fixture
def hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as in a hierarchy of version 2 with all controllers."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    monkeypatch.setattr("stratabox.daemon.hypervisor.cgroup.hierarchies", lambda: [tmp_path])
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "words", "remedy"),
    [
        (("--cgroups-limits", "off"), "not limited", 'cgroups.limits = "auto"'),
        (("--cgroups-folder", "/proc/x"), "in no hierarchy", "below"),
    ],
)
def test_limits_that_are_not_to_be_had(
    hierarchy: Path, argv: tuple[str, ...], words: str, remedy: str
) -> None:
    (found,) = kernel.check_control_groups(config(*argv))
    assert found.status is Status.WARN
    assert words in found.detail
    assert remedy in found.remedy


def test_controllers_that_are_missing(hierarchy: Path) -> None:
    asked = config("--cgroups-folder", str(hierarchy / "ours"))
    (found,) = kernel.check_control_groups(asked)
    assert (found.status, found.remedy) == (Status.OK, "")
    assert found.detail == f"version 2 (cpu, memory, pids): {hierarchy}/ours"
    (hierarchy / "cgroup.controllers").write_text("cpu pids\n")
    (found,) = kernel.check_control_groups(asked)
    assert found.status is Status.WARN
    assert f"no controller memory in {hierarchy}" in found.detail
    assert "subtree_control" in found.remedy


@pytest.mark.parametrize(
    ("launcher", "profiles", "status", "words"),
    [
        ("qemu", "stratabox-confine (unconfined)\n", Status.OK, "is loaded"),
        ("qemu", "libvirtd (enforce)\n", Status.OK, "not loaded"),
        ("qemu", "", Status.OK, "only root can see"),
        ("libvirt", "libvirtd (enforce)\n", Status.WARN, "unless its profile says so"),
    ],
)
def test_apparmor(
    monkeypatch: pytest.MonkeyPatch, launcher: str, profiles: str, status: Status, words: str
) -> None:
    files = {kernel._APPARMOR: "Y\n", kernel._PROFILES: profiles, kernel._SELINUX: "1\n"}
    monkeypatch.setattr(kernel, "read", lambda path: files.get(path, ""))
    apparmor, selinux = kernel.check_labels(config("--launcher", launcher))
    assert apparmor.status is status
    assert words in apparmor.detail
    assert selinux.detail.startswith("enforcing")
