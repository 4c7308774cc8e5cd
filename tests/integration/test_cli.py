"""The command line against a real daemon: what people type, and what programs read."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from stratabox.client import Client, Image, SandboxRecord, Snapshot
from stratabox.client import Image as ImageRecord
from support.boot_disks import boot_disk

PROGRAM = Path(sys.executable).with_name("stratabox")
SANDBOX_KEYS = {one.name for one in fields(SandboxRecord)}
SNAPSHOT_KEYS = {one.name for one in fields(Snapshot)} - {"stall"} | {"stall_seconds"}
IMAGE_KEYS = {one.name for one in fields(ImageRecord)}


@dataclass(frozen=True)
class Cli:
    """Runs `stratabox` with words as they stand on a command line."""

    address: str

    def bytes(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        environment = {key: value for key, value in os.environ.items() if "STRATABOX" not in key}
        return subprocess.run(
            [PROGRAM, *words],
            env=environment | {"STRATABOX_ADDRESS": self.address},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            check=False,
        )

    def __call__(self, *words: str, code: int = 0) -> str:
        """What it prints; it must exit with that code."""
        done = self.bytes(*words)
        assert done.returncode == code, (words, done)
        return done.stdout.decode()

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))

    def error(self, *words: str, code: int) -> str:
        """What it says on stderr when it fails; nothing is on stdout then."""
        done = self.bytes(*words)
        assert (done.returncode, done.stdout) == (code, b""), (words, done)
        return done.stderr.decode()

    def error_json(self, *words: str, code: int) -> dict[str, Any]:
        body = json.loads(self.error(*words, "--json", code=code))
        assert set(body) == {"error"}
        assert set(body["error"]) == {"reason", "message", "metadata"}
        error: dict[str, Any] = body["error"]
        return error


@pytest.fixture(scope="module")
def cli(client: Client, tiny: Image) -> Cli:
    return Cli(client.address)


@pytest.fixture(scope="module")
def made(cli: Cli) -> Iterator[dict[str, Any]]:
    """What `sandbox create` prints for the sandbox that most tests here use."""
    record: dict[str, Any] = cli.json(
        "sandbox", "create", "--name", "debugbox", "--image", "tiny", "--cpus", "2",
        "--memory", "256", "--disk", "2", "--env", "A=b c=d", "--metadata", "team=db", "--tag", "t",
    )  # fmt: skip
    yield record
    cli("sandbox", "delete", record["id"])


@pytest.fixture(scope="module")
def box(made: dict[str, Any]) -> str:
    return str(made["id"])


# -- sandboxes ------------------------------------------------------------------------------------


def test_create_prints_the_record(made: dict[str, Any]) -> None:
    assert set(made) == SANDBOX_KEYS
    assert (made["name"], made["state"], made["ready"]) == ("debugbox", "running", True)
    assert (made["cpus"], made["memory"], made["storage"]) == (2, 256, 2)
    assert (made["env"], made["metadata"], made["tags"]) == ({"A": "b c=d"}, {"team": "db"}, ["t"])
    assert (made["image_name"], made["source_snapshot_id"]) == ("tiny", None)
    for key in ("created_at", "started_at", "ready_at"):
        assert made[key].endswith("Z")
        assert datetime.fromisoformat(made[key]) < datetime.now(UTC)
    assert made["terminated_at"] is None
    assert set(made["disks"][0]) == {"index", "size_bytes", "serial", "chain_depth"}
    assert made["machine"]["accelerator"] in ("tcg", "kvm")


def test_list_and_get(cli: Cli, box: str, made: dict[str, Any]) -> None:
    listed = cli.json("sandbox", "list")
    assert set(listed) == {"sandboxes", "next_page_token"}
    assert listed["next_page_token"] is None
    assert box in [one["id"] for one in listed["sandboxes"]]
    for words in (["debugbox"], [box[:13]], ["--session", box], ["--session", "debugbox"]):
        got = cli.json("sandbox", "get", *words)
        assert got | {"space": None} == made | {"space": None}  # a guest that has booted writes on
    for filters, found in (
        (["--state", "running", "--name", "debugbox"], True),
        (["--tag", "t", "--metadata", "team=db", "--image", "tiny"], True),
        (["--state", "paused"], False),
        (["--tag", "other"], False),
    ):
        names = [one["name"] for one in cli.json("sandbox", "list", *filters)["sandboxes"]]
        assert ("debugbox" in names) is found
    other = cli.json("sandbox", "create", "--image", "tiny", "--memory", "128", "--no-wait")
    page = cli.json("sandbox", "list", "--limit", "1")
    assert [one["id"] for one in page["sandboxes"]] == [other["id"]]
    rest = cli.json("sandbox", "list", "--limit", "1", "--page-token", page["next_page_token"])
    assert rest["sandboxes"][0]["id"] != other["id"]
    table = cli("sandbox", "list").splitlines()
    assert table[0].split() == ["ID", "NAME", "STATE", "CPUS", "MEMORY", "DISK", "IMAGE", "CREATED"]
    assert any(line.startswith(f"{box}  debugbox") for line in table)
    assert cli.json("sandbox", "terminate", "--session", other["id"])["state"] == "terminated"
    assert other["id"] not in cli("sandbox", "list")
    assert other["id"] in cli("sandbox", "list", "--all")
    gone = cli.json("sandbox", "delete", other["id"])
    assert gone == {"id": other["id"], "name": other["name"], "deleted": True}


def test_update(cli: Cli, box: str) -> None:
    changed = cli.json(
        "sandbox", "update", box, "--name", "new", "--metadata", "a=b", "--clear", "tags"
    )
    assert (changed["name"], changed["metadata"], changed["tags"]) == ("new", {"a": "b"}, [])
    back = cli.json("sandbox", "update", "new", "--name", "debugbox", "--tag", "t")
    assert (back["name"], back["metadata"], back["tags"]) == ("debugbox", {"a": "b"}, ["t"])


def test_pause_and_resume(cli: Cli, box: str) -> None:
    assert cli.json("sandbox", "pause", "debugbox")["state"] == "paused"
    assert "hint" not in cli.error("sandbox", "exec", box, "true", code=4)
    assert cli.json("sandbox", "resume", "--session", box)["state"] == "running"


# -- exec -----------------------------------------------------------------------------------------


def test_exec_is_as_if_it_ran_here(cli: Cli, box: str) -> None:
    done = cli.bytes(
        "sandbox", "exec", "--session", box, "--timeout", "30s", "--env", "B=2", "--cwd", "/tmp",
        "sh", "-lc", "echo $A $B; pwd; echo err >&2; exit 3",
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (3, b"b c=d 2\n/tmp\n", b"err\n")
    raw = cli.bytes("sandbox", "exec", box, "printf", r"\000\377\n")
    assert (raw.returncode, raw.stdout) == (0, b"\x00\xff\n")
    # From its first word on everything is the command's own.
    for words in (["--session", box], [box], [box, "--"], ["--session", box, "--"]):
        said = cli(
            "sandbox", "exec", *words, "echo", "--json", "--help", "--session", "x", "--", "-n"
        )
        assert said == "--json --help --session x -- -n\n"


def test_exec_codes(cli: Cli, box: str) -> None:
    for line, code in (("exit 0", 0), ("exit 255", 255), ("kill -9 $$", 137), ("kill $$", 143)):
        assert cli("sandbox", "exec", box, "sh", "-c", line, code=code) == ""
    assert cli.bytes("sandbox", "exec", box, "no-such-program").returncode == 127
    late = cli.bytes("sandbox", "exec", box, "--timeout", "3s", "sh", "-c", "echo early; sleep 99")
    assert (late.returncode, late.stdout) == (124, b"early\n")
    assert b"the time was up" in late.stderr
    assert cli.error("sandbox", "exec", "nobody", "true", code=3).startswith("error: ")
    assert cli.error("sandbox", "exec", box, code=2).startswith("error: ")


def test_exec_for_programs(cli: Cli, box: str) -> None:
    done = cli.bytes(
        "sandbox", "exec", box, "--json", "sh", "-c", r"echo hi; printf '\377' >&2; exit 5"
    )
    assert (done.returncode, done.stderr) == (5, b"")
    body = json.loads(done.stdout)
    assert body.pop("duration_seconds") > 0
    assert base64.b64decode(body["stderr_base64"]) == b"\xff"
    assert body == {
        "exit_code": 5, "signal": None, "timed_out": False,
        "stdout": "hi\n", "stdout_base64": None, "stdout_truncated": False,
        "stderr": "\ufffd", "stderr_base64": "/w==", "stderr_truncated": False,
        "out_of_memory": False, "disk_full": False,
    }  # fmt: skip


# -- snapshots ------------------------------------------------------------------------------------


def test_snapshots(cli: Cli, box: str) -> None:
    expires = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    baseline = cli.json(
        "sandbox", "snapshot", "create", "--session", box, "--name", "before-upgrade",
        "--expires-at", expires, "--metadata", "k=v",
    )  # fmt: skip
    assert set(baseline) == SNAPSHOT_KEYS
    assert (baseline["name"], baseline["state"]) == ("before-upgrade", "ready")
    assert (baseline["consistency"], baseline["requested_level"]) == ("application", None)
    assert (baseline["expires_at"], baseline["metadata"]) == (expires, {"k": "v"})
    assert baseline["stall_seconds"] > 0
    quick = cli.json("snapshot", "create", "debugbox", "--quick", "--wait-timeout", "10m")
    assert (quick["consistency"], quick["parent_snapshot_id"]) == ("crash", baseline["id"])
    named = cli.json("snapshot", "create", "debugbox", "--level", "application", "--no-wait")
    assert named["requested_level"] == "application"
    assert cli.json("sandbox", "snapshot", "get", "before-upgrade") == baseline
    listed = cli.json("sandbox", "snapshot", "list", "--session", box)
    assert [one["id"] for one in listed["snapshots"]] == [named["id"], quick["id"], baseline["id"]]
    assert listed["next_page_token"] is None
    assert len(cli.json("sandbox", "snapshot", "list", "--limit", "1")["snapshots"]) == 1
    table = cli("sandbox", "snapshot", "list")
    assert table.split()[:4] == ["ID", "NAME", "STATE", "CONSISTENCY"]
    updated = cli.json("snapshot", "update", quick["id"], "--name", "q", "--expires-at", expires)
    assert (updated["name"], updated["expires_at"]) == ("q", expires)
    assert cli.json("snapshot", "update", "q", "--no-expiry")["expires_at"] is None
    for one in (named["id"], "q", "before-upgrade"):
        deleted = cli.json("sandbox", "snapshot", "delete", one)
        keys = {"id", "name", "deleted", "freed_bytes", "kept_bytes", "kept_for"}
        assert set(deleted) == keys
        assert deleted["deleted"] is True
        assert deleted["kept_for"] == [box]
    assert cli.error_json("snapshot", "get", "q", code=3)["reason"] == "SNAPSHOT_NOT_FOUND"


def test_a_save_point(cli: Cli, box: str) -> None:
    cli(
        "sandbox", "exec", "--session", box, "sh", "-lc", "echo strace >/root/tool; echo 1 >/root/n"
    )
    saved = cli.json(
        "sandbox", "snapshot", "create", "--session", box, "--name", "with-strace",
        "--wait-timeout", "10m",
    )  # fmt: skip
    # Twice from the snapshot, and once more from the sandbox as it is by then.
    restored = cli.json(
        "snapshot", "restore", "with-strace", "--name", "debugbox-restored", "--cpus", "1"
    )
    assert (restored["name"], restored["source_snapshot_id"]) == ("debugbox-restored", saved["id"])
    assert (restored["cpus"], restored["storage"], restored["ready"]) == (1, 2, True)
    assert cli("sandbox", "exec", "debugbox-restored", "cat", "/root/tool") == "strace\n"
    again = cli.json("sandbox", "create", "--snapshot", saved["id"], "--no-wait")
    assert again["source_snapshot_id"] == saved["id"]
    cloned = cli.json(
        "sandbox", "clone", box, "--count", "2", "--name", "w", "--quick", "--no-wait"
    )
    assert set(cloned) == {"snapshot", "sandbox", "sandboxes", "errors"}
    assert [one["name"] for one in cloned["sandboxes"]] == ["w-1", "w-2"]
    assert (cloned["sandbox"], cloned["errors"]) == (cloned["sandboxes"][0], [])
    assert cloned["snapshot"]["consistency"] == "crash"
    for one in (restored["id"], again["id"], "w-1", "w-2"):
        cli("sandbox", "delete", one)

    # Back to it, and what was there since is kept for a while.
    cli("sandbox", "exec", box, "sh", "-c", "echo 2 >/root/n; sync")
    reverted = cli.json("sandbox", "revert", box, "--snapshot", "with-strace")
    assert set(reverted) == {"sandbox", "safety_snapshot"}
    assert (reverted["sandbox"]["id"], reverted["sandbox"]["ready"]) == (box, True)
    safety = reverted["safety_snapshot"]
    life = datetime.fromisoformat(safety["expires_at"]) - datetime.fromisoformat(
        safety["created_at"]
    )
    assert timedelta(hours=23, minutes=59) < life < timedelta(hours=24, minutes=1)
    assert cli("sandbox", "exec", box, "cat", "/root/n") == "1\n"
    for one in (safety["id"], cloned["snapshot"]["id"], saved["id"]):
        assert cli("snapshot", "delete", one).startswith("deleted snapshot ")


def test_a_wait_timeout_ends_the_waiting_alone(cli: Cli, box: str) -> None:
    hook = "/etc/qemu/fsfreeze-hook.d/slow"
    line = f"printf '#!/bin/sh\\n[ $1 = thaw ] || sleep 2\\n' >{hook}; chmod +x {hook}"
    cli("sandbox", "exec", box, "sh", "-c", line)
    error = cli.error_json("snapshot", "create", box, "--wait-timeout", "200ms", code=124)
    assert error["reason"] == "DEADLINE_EXCEEDED"
    snapshot = error["metadata"]["snapshot_id"]
    assert snapshot in error["message"]
    cli("sandbox", "exec", box, "rm", hook)  # waits until the guest is thawed
    cli.json("snapshot", "create", box, "--name", "next")  # comes after it
    assert cli.json("snapshot", "get", snapshot)["state"] == "ready"
    for one in (snapshot, "next"):
        cli("snapshot", "delete", one)


def test_stop_and_start(cli: Cli, box: str) -> None:
    stopped = cli.json("sandbox", "stop", box, "--timeout", "30s")
    assert (stopped["state"], stopped["state_reason"]) == ("stopped", "shut down by request")
    assert "stopped" in cli.error("sandbox", "exec", box, "true", code=4)
    started = cli.json("sandbox", "start", box, "--no-wait")
    assert started["state"] == "running"
    assert cli.json("sandbox", "stop", box, "--force")["state"] == "stopped"
    cli.json("sandbox", "start", box, "--no-wait")


# -- images ---------------------------------------------------------------------------------------


def test_images(cli: Cli, tmp_path: Path) -> None:
    built = cli.bytes("image", "build", "tiny", "--name", "cli-tiny")
    assert built.returncode == 0
    assert built.stderr.strip()  # its steps
    image = cli.json("image", "get", "cli-tiny")
    assert set(image) == IMAGE_KEYS
    assert (image["state"], image["boot"], image["origin"]) == ("ready", "kernel", "tiny")
    listed = cli.json("image", "list")
    assert set(listed) == {"images", "next_page_token"}
    assert image in listed["images"]
    assert cli("image", "list").split()[:3] == ["ID", "NAME", "STATE"]
    assert cli.error_json("image", "build", "tiny", "--name", "cli-tiny", code=4)["reason"] == (
        "IMAGE_ALREADY_EXISTS"
    )
    other = cli.json("image", "build", "tiny", "--name", "cli-tiny", "--replace")
    assert other["id"] != image["id"]
    deleted = cli.json("image", "delete", "cli-tiny")
    assert (deleted["id"], deleted["deleted"]) == (other["id"], True)
    assert deleted["freed_bytes"] > 0

    disk = tmp_path / "disk.raw"
    boot_disk(disk)
    taken = cli.bytes("image", "import", str(disk), "--name", "cli-raw")
    assert taken.returncode == 0
    assert b"as raw, as its suffix says" in taken.stderr
    error = cli.error_json("image", "import", str(disk), "--name", "x", "--format", "qcow2", code=2)
    assert error["reason"] == "INVALID_IMAGE"
    assert "--format" in cli.error(
        "image", "import", str(disk.rename(tmp_path / "disk")), "--name", "x", code=2
    )
    assert cli("image", "delete", "cli-raw").startswith("deleted image cli-raw")


# -- the rest -------------------------------------------------------------------------------------


def test_what_a_create_needs(cli: Cli) -> None:
    error = cli.error_json("sandbox", "create", "--image", "tiny", "--cpus", "33", code=2)
    assert error["reason"] == "INVALID_RESOURCES"
    assert error["metadata"]["maximum"] == "32"
    assert (
        cli.error_json("sandbox", "create", "--image", "no", code=3)["reason"] == "IMAGE_NOT_FOUND"
    )
    text = cli.error("sandbox", "create", "--image", "no", code=3)
    assert text.startswith("error: there is no image 'no'")
    assert "\nhint: " in text
    assert cli.error_json("sandbox", "create", "--nonsense", code=2)["reason"] == "USAGE"
    assert cli.error_json("sandbox", "get", code=2)["reason"] == "USAGE"
    past = ("snapshot", "create", "x", "--expires-at", "2001-01-01T00:00:00")
    assert "RFC 3339" in cli.error(*past, code=2)


def test_names_from_elsewhere_cannot_move_the_cursor(
    cli: Cli, client: Client, tiny: Image, box: str
) -> None:
    client.sandboxes.update(box, metadata={"k": "\x1b[2J[bold]"})
    assert "\\x1b[2J[bold]" in cli("sandbox", "get", box)
    assert cli.json("sandbox", "get", box)["metadata"] == {"k": "\x1b[2J[bold]"}


def test_config_show(cli: Cli, client: Client) -> None:
    shown = cli.json("config", "show")
    assert set(shown) == {"settings"}
    settings = {one["key"]: one for one in shown["settings"]}
    assert all(set(one) == {"key", "value", "source"} for one in shown["settings"])
    assert settings["state_dir"]["value"] == f'"{client.host().state_dir}"'
    assert settings["state_dir"]["source"] == "environment STRATABOX_STATE_DIR"
    assert settings["default_level"] == {
        "key": "default_level", "value": '"application"', "source": "default",
    }  # fmt: skip
    assert "default_level" in cli("config", "show")


def test_doctor(cli: Cli, tmp_path: Path) -> None:
    done = cli.bytes("doctor", "--json", "--state-dir", str(tmp_path / "new"))
    report = json.loads(done.stdout)
    assert done.returncode in (0, 1)
    text = json.dumps(report)
    assert "qemu" in text.lower()
    assert "kvm" in text.lower()
    people = cli.bytes("doctor", "--state-dir", str(tmp_path / "new"))
    assert people.returncode == done.returncode
    assert b"QEMU" in people.stdout


def test_version_and_help(cli: Cli, client: Client) -> None:
    assert cli.json("version") == {"version": client.host().version}
    assert "Exit codes:" in cli("--help")
    assert "--wait-timeout" in cli("sandbox", "snapshot", "create", "--help")


def test_no_daemon(tmp_path: Path) -> None:
    cli = Cli(f"unix://{tmp_path}/api.sock")
    error = cli.error_json("sandbox", "list", code=5)
    assert error["reason"] == "DAEMON_UNAVAILABLE"
    assert str(tmp_path) in error["message"]
    assert "hint: " in cli.error("sandbox", "list", code=5)
    assert "INVALID_ADDRESS" in cli.error(
        "sandbox", "list", "--address", "ftp://x", "--json", code=2
    )
    shown = cli.bytes("config", "show", "--json")  # what a daemon started here would use
    assert "settings" in json.loads(shown.stdout)
