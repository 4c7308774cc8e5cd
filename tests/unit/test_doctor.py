"""The doctor: what it reads, what it says, and that it never breaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratabox.daemon import __main__ as strataboxd
from stratabox.daemon import doctor, extras
from stratabox.daemon.config import Config, load
from stratabox.daemon.doctor import capacity, libvirt
from stratabox.daemon.doctor import guests as doctor_guests
from stratabox.daemon.doctor import host as doctor_host
from stratabox.daemon.doctor.finding import Finding, Status
from stratabox.daemon.hypervisor import confinement


def config(*argv: str) -> Config:
    return load(argv, {"HOME": "/home/ann"})


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", (7, 2, 22)),
        ("QEMU emulator version 8.2.2 (Debian 1:8.2.2+ds-0ubuntu1.4)\nCopyright", (8, 2, 2)),
        ("QEMU emulator version 10.0", (10, 0, 0)),
        ("bash: no such thing", None),
    ],
)
def test_qemu_versions(text: str, version: tuple[int, int, int] | None) -> None:
    assert doctor_guests.parse_version(text) == version


def test_newest_machine_first() -> None:
    text = "q35  Standard PC (alias of pc-q35-9.2)\npc-q35-9.2  x\npc-q35-10.0  x\npc-i440fx-9.2 x"
    assert doctor_guests.q35_machines(text) == ["pc-q35-10.0", "pc-q35-9.2"]


@pytest.mark.parametrize(
    ("scope", "library", "words"),
    [
        ("", False, "reads its own"),
        ("0", False, "reads its own"),
        ("1", True, "reads its own"),
        ("1", False, "started itself only"),
        ("2", True, "cannot be read"),
    ],
)
def test_the_right_to_read_guests_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scope: str, library: bool, words: str
) -> None:
    found = tmp_path / "library"
    if library:
        found.touch()
    monkeypatch.setattr("stratabox.daemon.hypervisor.memory.tracking.LIBRARY", found)
    monkeypatch.setattr(doctor_guests, "read", lambda _: f"{scope}\n")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    (finding,) = doctor_guests.check_memory_rights(config())
    assert words in finding.detail
    assert bool(finding.remedy) == ("reads" not in words)


def test_virtualisation_flags() -> None:
    assert doctor_guests.has_virtualisation("flags\t\t: fpu svm de\n")
    assert doctor_guests.has_virtualisation("processor: 0\nflags : vmx\n")
    assert not doctor_guests.has_virtualisation("flags : fpu svm_lock de\nbugs : vmx\n")


def test_an_absent_qemu_fails_with_the_command_that_mends_it() -> None:
    (finding,) = doctor_guests.check_qemu(config("--qemu-binary", "/nonexistent/qemu"))
    assert finding.status is Status.FAIL
    assert "apt-get install" in finding.remedy


def test_an_old_qemu_fails(tmp_path: Path) -> None:
    binary = tmp_path / "qemu"
    binary.write_text("#!/bin/sh\necho QEMU emulator version 6.2.0\n")
    binary.chmod(0o755)
    (finding,) = doctor_guests.check_qemu(config("--qemu-binary", str(binary)))
    assert finding.status is Status.FAIL
    assert "6.2.0" in finding.detail
    assert "7.2" in finding.remedy


def test_a_state_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = doctor_host.check_state_dir(config("--state-dir", f"{tmp_path}/file/state"))
    assert finding.status is Status.FAIL


def test_a_state_folder_that_will_be_made(tmp_path: Path) -> None:
    finding, space = doctor_host.check_state_dir(config("--state-dir", f"{tmp_path}/a/b"))
    assert (finding.status, finding.detail) == (Status.OK, f"{tmp_path}/a/b (will be made)")
    assert "GiB free" in space.detail


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_odd_thing(config: Config) -> Iterator[Finding]:
        yield Finding("first", Status.OK, "fine")
        raise OSError("odd")

    monkeypatch.setattr(doctor, "CHECKS", (check_odd_thing,))
    report = doctor.examine(config())
    assert report.ok
    assert report.checks[-1] == Finding(
        "odd-thing", Status.WARN, "the check itself broke: OSError: odd"
    )


def test_exit_code_and_both_forms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_bad(config: Config) -> Iterator[Finding]:
        yield Finding("thing", Status.FAIL, "is missing", "apt-get install thing")

    monkeypatch.setattr(doctor, "CHECKS", (check_bad,))
    assert strataboxd.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "checks": [
            {
                "name": "thing",
                "status": "fail",
                "detail": "is missing",
                "remedy": "apt-get install thing",
            }
        ],
        "ok": False,
    }
    assert strataboxd.main(["doctor"]) == 1
    assert "→ apt-get install thing" in capsys.readouterr().out


def test_this_host_can_be_examined(capsys: pytest.CaptureFixture[str]) -> None:
    strataboxd.main(["doctor", "--json"])
    names = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]
    assert "qemu" in names
    assert len(names) == len(set(names))


def test_without_its_extra_strataboxd_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "DAEMON", ("qemu.no_such", "no_such_top.level"))
    assert strataboxd.main([]) == 1
    printed = capsys.readouterr().err
    assert "pip install 'stratabox[daemon]'" in printed
    assert "qemu.no_such, no_such_top.level" in printed


def test_a_libvirt_that_does_not_answer_is_to_be_mended(tmp_path: Path) -> None:
    if extras.missing_modules(extras.LIBVIRT):
        pytest.skip("libvirt's Python module is not installed")
    uri = f"qemu+unix:///system?socket={tmp_path}/absent"
    asked = config("--launcher", "libvirt", "--libvirt-uri", uri)
    found = {each.name: each for each in libvirt.check_libvirt(asked)}
    assert found["libvirt"].status is Status.FAIL
    assert "cannot be reached" in found["libvirt"].detail
    assert "systemctl start libvirtd" in found["libvirt"].remedy
    assert found["libvirt-emulator"].status is Status.OK
    (unasked,) = libvirt.check_libvirt(config("--libvirt-uri", uri))
    assert unasked.status is Status.OK


def test_under_libvirt_the_doctor_says_what_keeps_walls_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = config("--launcher", "libvirt", "--confinement", "required")
    forbidden = {"/proc/sys/user/max_user_namespaces": "0\n"}
    for landlock, sysctls, status, says in (
        (7, {}, Status.OK, "Landlock 7 and seccomp"),
        (7, forbidden, Status.FAIL, "max_user_namespaces is 0"),
        (0, {}, Status.FAIL, "no Landlock"),
    ):
        monkeypatch.setattr(confinement, "landlock_version", lambda v=landlock: v)
        monkeypatch.setattr(capacity, "read", lambda path, s=sysctls: s.get(str(path), ""))
        (found,) = capacity.check_confinement(asked)
        assert (found.name, found.status) == ("confinement", status)
        assert says in found.detail
        assert bool(found.remedy) == (status is Status.FAIL)
