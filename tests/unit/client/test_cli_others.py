"""`stratabox snapshot`, `image`, `config`, `doctor`, `version`, and what all commands share."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from stratabox.client.cli import cli
from stratabox.client.cli.app import App
from stratabox.client.cli.options import parse_duration, parse_rfc3339
from stratabox.client.cli.output import printable, size
from stratabox.v1 import host_pb2, images_pb2, records_pb2, snapshots_pb2

CREATING = records_pb2.SNAPSHOT_STATE_CREATING


@pytest.mark.parametrize("group", [["sandbox", "snapshot"], ["snapshot"]])
def test_snapshot_create(daemon: Any, run: Any, make: Any, group: list[str]) -> None:
    daemon.answers |= {
        "CreateSnapshot": make.snapshot(state=CREATING),
        "GetSnapshot": make.snapshot(state=CREATING),
        "WatchSnapshots": [make.snapshot_event(3), ...],
    }
    words = "create --session x --name before-upgrade --level application --wait-timeout 10m"
    words += " --expires-at 2036-03-20T12:00:00Z --metadata k=v"
    result = run(*group, *words.split(), "--json")
    assert result.exit_code == 0, result.stderr
    body = json.loads(result.stdout)
    assert (body["state"], body["consistency"]) == ("ready", "application")
    assert body["stall_seconds"] == 0.125
    assert body["expires_at"] is None
    assert body["source_sandbox_name"] == "debugbox"
    sent = daemon.last("CreateSnapshot")
    assert (sent.level, sent.wait, dict(sent.metadata)) == (2, False, {"k": "v"})
    assert sent.expires_at.ToJsonString() == "2036-03-20T12:00:00Z"


def test_a_wait_timeout_ends_the_waiting(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers |= {
        "CreateSnapshot": make.snapshot(state=CREATING),
        "GetSnapshot": make.snapshot(state=CREATING),
        "WatchSnapshots": [...],
    }
    result = run("snapshot", "create", "x", "--wait-timeout", "100ms")
    assert result.exit_code == 124
    assert make.snapshot_id in result.stderr
    assert "goes on" in result.stderr
    result = run("snapshot", "create", "x", "--wait-timeout", "100ms", "--json")
    assert json.loads(result.stderr)["error"]["metadata"]["snapshot_id"] == make.snapshot_id
    result = run("snapshot", "create", "x", "--quick", "--no-wait", "--json")
    assert json.loads(result.stdout)["state"] == "creating"
    assert daemon.last("CreateSnapshot").level == 1


def test_a_snapshots_level_comes_from_the_environment_where_none_is_named(
    daemon: Any, run: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.answers["CreateSnapshot"] = make.snapshot(state=CREATING)
    monkeypatch.setenv("STRATABOX_DEFAULT_LEVEL", "memory")
    for words, level in (((), 3), (("--quick",), 1), (("--level", "application"), 2)):
        assert run("snapshot", "create", "x", "--no-wait", *words).exit_code == 0
        assert daemon.last("CreateSnapshot").level == level
    monkeypatch.setenv("STRATABOX_DEFAULT_LEVEL", "strong")
    result = run("snapshot", "create", "x", "--no-wait")
    assert result.exit_code == 2
    assert "STRATABOX_DEFAULT_LEVEL" in result.stderr


def test_a_failed_snapshot(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers |= {
        "CreateSnapshot": make.snapshot(state=CREATING),
        "GetSnapshot": make.snapshot(state=3, failure_reason="frozen already"),
    }
    result = run("snapshot", "create", "x")
    assert result.exit_code == 1
    assert "frozen already" in result.stderr
    assert f"hint: stratabox sandbox snapshot get {make.snapshot_id}" in result.stderr


def test_snapshot_list_get_update_delete_restore(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers |= {
        "ListSnapshots": snapshots_pb2.ListSnapshotsResponse(snapshots=[make.snapshot()]),
        "GetSnapshot": make.snapshot(),
        "UpdateSnapshot": make.snapshot(),
        "DeleteSnapshot": snapshots_pb2.DeleteSnapshotResponse(
            id=make.snapshot_id, freed_bytes=4096, kept_bytes=1 << 20, kept_for=["other"]
        ),
        "RestoreSnapshot": make.sandbox(name="restored-copy"),
    }
    body = json.loads(run("sandbox", "snapshot", "list", "--session", "x", "--json").stdout)
    assert body["snapshots"][0]["id"] == make.snapshot_id
    assert body["next_page_token"] is None
    assert daemon.last("ListSnapshots").sandbox == "x"
    assert "baseline" in run("snapshot", "list").stdout
    assert "baseline" in run("snapshot", "get", "x").stdout
    assert run("snapshot", "update", "x", "--no-expiry").exit_code == 0
    assert list(daemon.last("UpdateSnapshot").update_mask.paths) == ["expires_at"]
    shown = run("snapshot", "delete", "x").stdout
    assert "4.0 KiB" in shown
    assert "1.0 MiB stay for: other" in shown
    body = json.loads(run("snapshot", "delete", "x", "--json").stdout)
    assert (body["id"], body["name"], body["kept_for"]) == (
        make.snapshot_id,
        "baseline",
        ["other"],
    )
    words = "sandbox snapshot restore x --name restored-copy --cpus 2 --env A=1 --json"
    assert json.loads(run(*words.split()).stdout)["name"] == "restored-copy"
    assert daemon.last("RestoreSnapshot").resources.cpus == 2


def test_image_build(daemon: Any, run: Any, make: Any) -> None:
    steps = [
        images_pb2.BuildImageResponse(progress=images_pb2.BuildProgress(step=step))
        for step in ("bootstrap", "bootstrap", "pack\x07")
    ]
    steps.append(images_pb2.BuildImageResponse(image=make.image()))
    daemon.answers["BuildImage"] = steps
    words = "image build debian --release trixie --name d --include strace,vim --include git"
    result = run(*words.split())
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "bootstrap\npack\\x07\n"
    sent = daemon.last("BuildImage")
    assert (sent.name, sent.debian.release) == ("d", "trixie")
    assert list(sent.debian.include) == ["strace", "vim", "git"]
    result = run("image", "build", "tiny", "--json")
    assert json.loads(result.stdout)["boot"] == "kernel"
    assert result.stderr == ""


def test_image_import(daemon: Any, run: Any, make: Any, tmp_path: Path) -> None:
    daemon.answers["ImportImage"] = make.image()
    file = tmp_path / "cloud.qcow2"
    file.write_bytes(b"QFI\xfb and more")
    result = run("image", "import", str(file), "--name", "cloud")
    assert result.exit_code == 0, result.stderr
    assert "as qcow2" in result.stderr
    parts = daemon.last("ImportImage")
    assert parts[0].header.format == images_pb2.DISK_FORMAT_QCOW2
    odd = tmp_path / "cloud.img"
    file.rename(odd)
    assert run("image", "import", str(odd), "--name", "cloud").exit_code == 2
    assert run("image", "import", str(odd), "--name", "c", "--format", "qcow2").exit_code == 0
    assert run("image", "import", str(tmp_path), "--name", "c").exit_code == 2


def test_image_list_get_delete(daemon: Any, run: Any, make: Any) -> None:
    import grpc

    daemon.answers |= {
        "ListImages": images_pb2.ListImagesResponse(images=[make.image()]),
        "GetImage": make.image(),
        "DeleteImage": images_pb2.DeleteImageResponse(id=make.image_id, freed_bytes=1024),
    }
    assert json.loads(run("image", "list", "--json").stdout)["images"][0]["name"] == "debian"
    assert "debian bookworm" in run("image", "list").stdout
    assert "2.0 GiB" in run("image", "get", "debian").stdout
    assert "1.0 KiB came free" in run("image", "delete", "debian").stdout
    daemon.answers["DeleteImage"] = make.refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "IMAGE_IN_USE"
    )
    assert run("image", "delete", "debian").exit_code == 4


def test_config_show_asks_the_daemon(daemon: Any, run: Any) -> None:
    setting = host_pb2.Setting(key="accel", value='"auto"', source="file /etc/x")
    daemon.answers["GetHost"] = host_pb2.Host(settings=[setting])
    assert run("config", "show").stdout == 'accel = "auto"  # file /etc/x\n'
    assert json.loads(run("config", "show", "--json").stdout) == {
        "settings": [{"key": "accel", "value": '"auto"', "source": "file /etc/x"}]
    }


def test_local_commands_run_the_daemons_program(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def fake_run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 1)

    def fake_exec(path: str, command: list[str]) -> None:
        ran.append(command)
        raise SystemExit(9)

    monkeypatch.setattr("subprocess.run", fake_run)
    monkeypatch.setattr("os.execv", fake_exec)
    there = ["--address", "unix:///nowhere/s"]
    start = [sys.executable, "-P", "-m", "stratabox.daemon"]
    invoke = CliRunner().invoke
    assert invoke(cli, ["doctor", "--json"]).exit_code == 1
    result = invoke(cli, [*there, "config", "show"])
    assert result.exit_code == 1
    assert "no daemon answers" in result.stderr
    assert invoke(cli, [*there, "daemon", "--state-dir", "/x", "--help"]).exit_code == 9
    assert ran == [
        [*start, "doctor", "--json"],
        [*start, *there, "config", "show"],
        [*start, *there, "--state-dir", "/x", "--help"],
    ]


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stratabox.client.cli.local._EXTRA", ("no_such_module.at_all",))
    monkeypatch.setattr(
        "subprocess.run", lambda command, check: subprocess.CompletedProcess(command, 0)
    )
    result = CliRunner().invoke(cli, ["doctor"])
    assert "pip install 'stratabox[daemon]'" in result.stderr


def test_version(run: Any) -> None:
    assert run("version").stdout.startswith("stratabox ")
    assert set(json.loads(run("version", "--json").stdout)) == {"version"}


def commands(group: click.Group, *path: str) -> list[tuple[tuple[str, ...], click.Command]]:
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, *path, name)
        else:
            found.append(((*path, name), command))
    return found


def test_every_command_takes_json_and_has_help() -> None:
    for path, command in commands(cli):
        if path == ("daemon",):
            continue  # all its words are the daemon's
        names = {name for param in command.params for name in param.opts}
        assert {"--json", "--address"} <= names, path
        result = CliRunner().invoke(cli, [*path, "--help"])
        assert result.exit_code == 0, path
        assert command.help, path


@pytest.mark.parametrize("words", [["sandbox", "crate"], ["sandbox", "create", "--nonsense"]])
def test_usage_errors(run: Any, words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "--help" in result.stderr
    assert json.loads(run(*words, "--json").stderr)["error"]["reason"] == "USAGE"
    assert run().exit_code == 2


def test_ctrl_c(daemon: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stratabox.client.sync.Client.__enter__", interrupt)
    assert run("sandbox", "get", "x").exit_code == 130


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 90), ("30s", 30), ("10m", 600), ("1h", 3600), ("1h30m", 5400), ("500ms", 0.5)),
        *(("1.5s", 1.5), ("0", 0)),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "s", "1d", "1 s", "m5", "1s1m", "٣s", "nan", "1e3"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="no span"):
        parse_duration(text)


def test_times() -> None:
    whole = datetime(2026, 3, 20, 12, tzinfo=UTC)
    for text in ("2026-03-20T12:00:00Z", "2026-03-20t12:00:00z", "2026-03-20T14:00:00.000+02:00"):
        assert parse_rfc3339(text) == whole
    for text in ("2026-03-20", "2026-03-20T12:00:00", "2026-03-20 12:00:00Z", "20260320T120000Z"):
        with pytest.raises(ValueError, match="RFC 3339"):
            parse_rfc3339(text)
    with pytest.raises(ValueError, match="month"):
        parse_rfc3339("2026-13-20T12:00:00Z")


def test_small_things() -> None:
    assert printable("a\tb\x9bé\u2066") == r"a\tb\x9bé\u2066"
    assert [size(0), size(1023), size(1 << 20)] == ["0 bytes", "1023 bytes", "1.0 MiB"]


def test_the_examples_of_the_manual_parse() -> None:
    known = dict(commands(cli))
    shown = set()
    manual = Path(__file__).resolve().parents[3] / "docs" / "cli.md"
    for line in manual.read_text(encoding="utf-8").splitlines():
        if not line.startswith("stratabox "):
            continue
        words = shlex.split(line)[1:]
        path = next(path for path in known if tuple(words[: len(path)]) == path)
        shown.add(path)
        if path[-1] == "import":
            continue  # its file must be there
        known[path].make_context(path[-1], words[len(path) :], obj=App())
    aliases = {path for path in known if path[0] == "snapshot"}
    assert shown == set(known) - aliases
