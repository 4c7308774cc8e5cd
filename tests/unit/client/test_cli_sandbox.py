"""`stratabox sandbox`, against a daemon of canned answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import grpc
import pytest

from stratabox.v1 import records_pb2, sandboxes_pb2

EVIL = "\x1b[31m[red]\u202e\nname"


def test_create_with_everything(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers["CreateSandbox"] = make.sandbox()
    words = "--name debugbox --image debian --cpus 2 --memory 512 --disk 10 --env A=1=2 --env B="
    words += " --metadata k=v --tag t --tag u --data-disk 1 --data-disk 2 --ready-timeout 1m30s"
    result = run("sandbox", "create", *words.split(), "--json")
    assert result.exit_code == 0, result.stderr
    sent = daemon.last("CreateSandbox")
    assert dict(sent.env) == {"A": "1=2", "B": ""}
    assert (sent.resources.cpus, sent.resources.memory, sent.resources.storage) == (2, 512, 10)
    assert (list(sent.tags), list(sent.data_disks)) == (["t", "u"], [1, 2])
    assert sent.ready_timeout.seconds == 90
    body = json.loads(result.stdout)
    assert (body["id"], body["name"]) == (make.sandbox_id, "debugbox")
    assert body["state"] == "running"
    assert body["created_at"] == "2026-03-20T12:00:00.250000Z"
    assert body["started_at"] is None
    assert body["state_reason"] is None
    assert body["disks"][0]["size_bytes"] == 10 << 30
    assert body["machine"]["accelerator"] == "tcg"
    assert not [key for key in body if key.startswith("_")]


def test_create_from_a_snapshot_without_waiting(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers["CreateSandbox"] = make.sandbox()
    assert run("sandbox", "create", "--snapshot", "s", "--no-wait").exit_code == 0
    sent = daemon.last("CreateSandbox")
    assert (sent.snapshot, sent.wait_for_ready) == ("s", False)


def test_list_as_json_and_as_a_table(daemon: Any, run: Any, make: Any) -> None:
    page = sandboxes_pb2.ListSandboxesResponse(
        sandboxes=[make.sandbox(name=EVIL)], next_page_token="more"
    )
    daemon.answers["ListSandboxes"] = page
    listing = ["sandbox", "list", "--limit", "1", "--state", "running"]
    words = [*listing, "--tag", "t", "--metadata", "k=v", "--all"]
    body = json.loads(run(*words, "--json").stdout)
    assert body["next_page_token"] == "more"
    assert body["sandboxes"][0]["name"] == EVIL
    sent = daemon.last("ListSandboxes")
    assert (sent.page_size, list(sent.states), sent.include_terminated) == (1, [2], True)
    shown = run(*words)
    assert "more: --page-token more" in shown.stderr
    assert r"\x1b[31m[red]\u202e\nname" in shown.stdout
    assert "\x1b" not in shown.stdout
    page.next_page_token = ""
    body = json.loads(run("sandbox", "list", "--json").stdout)
    assert body["next_page_token"] is None


@pytest.mark.parametrize("verb", ["get", "pause", "resume", "stop", "start", "terminate"])
@pytest.mark.parametrize("named", [["debugbox"], ["--session", "debugbox"]])
def test_verbs_of_one_sandbox(
    daemon: Any, run: Any, make: Any, verb: str, named: list[str]
) -> None:
    rpc = f"{verb.capitalize()}Sandbox"
    daemon.answers[rpc] = make.sandbox(name=EVIL)
    result = run("sandbox", verb, *named)
    assert result.exit_code == 0, result.stderr
    assert daemon.last(rpc).sandbox == "debugbox"
    assert make.sandbox_id in result.stdout
    assert "\x1b" not in result.stdout
    assert json.loads(run("sandbox", verb, *named, "--json").stdout)["id"] == make.sandbox_id


def test_the_sandbox_is_named_once(run: Any) -> None:
    assert run("sandbox", "get").exit_code == 2
    twice = run("sandbox", "get", "a", "--session", "b")
    assert twice.exit_code == 2
    assert "hint: " in twice.stderr


def test_delete_tells_id_and_name(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers |= {
        "GetSandbox": make.sandbox(),
        "DeleteSandbox": sandboxes_pb2.DeleteSandboxResponse(id=make.sandbox_id),
    }
    body = json.loads(run("sandbox", "delete", "debugbox", "--json").stdout)
    assert body == {"id": make.sandbox_id, "name": "debugbox", "deleted": True}
    assert daemon.last("DeleteSandbox").sandbox == make.sandbox_id
    assert "deleted sandbox debugbox" in run("sandbox", "delete", "debugbox").stdout


def test_update(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers["UpdateSandbox"] = make.sandbox()
    assert run("sandbox", "update", "x", "--name", "n", "--clear", "tags").exit_code == 0
    assert list(daemon.last("UpdateSandbox").update_mask.paths) == ["name", "tags"]


def test_clone(daemon: Any, run: Any, make: Any) -> None:
    copy = sandboxes_pb2.CloneResult(sandbox=make.sandbox())
    failure = records_pb2.Failure(reason="NO_SPACE", message="full")
    reply = sandboxes_pb2.CloneSandboxResponse(snapshot=make.snapshot(), results=[copy])
    daemon.answers["CloneSandbox"] = reply
    result = run("sandbox", "clone", "x", "--quick", "--json")
    assert result.exit_code == 0
    body = json.loads(result.stdout)
    assert body["snapshot"]["consistency"] == "application"
    assert body["sandbox"] == body["sandboxes"][0]
    assert body["errors"] == []
    assert daemon.last("CloneSandbox").level == 1
    reply.results.append(sandboxes_pb2.CloneResult(failure=failure))
    result = run("sandbox", "clone", "x", "--count", "2", "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["errors"][0]
    assert error == {"reason": "NO_SPACE", "message": "full", "metadata": {}}
    assert "full" in run("sandbox", "clone", "x", "--count", "2").stderr


def test_revert(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers["RevertSandbox"] = sandboxes_pb2.RevertSandboxResponse(
        sandbox=make.sandbox(), safety_snapshot=make.snapshot()
    )
    body = json.loads(run("sandbox", "revert", "x", "--snapshot", "s", "--json").stdout)
    assert body["safety_snapshot"]["id"] == make.snapshot_id
    assert daemon.last("RevertSandbox").snapshot == "s"
    assert make.snapshot_id in run("sandbox", "revert", "x", "--snapshot", "s").stderr


@pytest.mark.parametrize(
    ("words", "argv"),
    [
        (["--session", "x", "bash", "-lc", "a | b"], ["bash", "-lc", "a | b"]),
        (["x", "ls", "--json", "--help"], ["ls", "--json", "--help"]),
        (["--session=x", "ls", "--session", "y"], ["ls", "--session", "y"]),
        (["x", "--timeout", "5", "ls", "-l"], ["ls", "-l"]),
        (["--timeout", "5", "x", "ls"], ["ls"]),
        (["x", "--", "--odd", "-x"], ["--odd", "-x"]),
        (["--", "x", "ls"], ["ls"]),
        (["x", "env", "--", "-i"], ["env", "--", "-i"]),
        (["--session", "x", "--", "ls", "--"], ["ls", "--"]),
    ],
)
def test_exec_leaves_the_command_alone(
    daemon: Any, run: Any, words: list[str], argv: list[str]
) -> None:
    daemon.answers["ExecuteCommand"] = sandboxes_pb2.ExecuteCommandResponse(exit_code=0)
    result = run("sandbox", "exec", *words)
    assert result.exit_code == 0, result.stderr
    sent = daemon.last("ExecuteCommand")
    assert (sent.sandbox, list(sent.argv)) == ("x", argv)
    assert sent.timeout.seconds == (5 if "--timeout" in words else 0)


@pytest.mark.parametrize("words", [[], ["x"], ["--session", "x"], ["--nonsense", "x", "ls"]])
def test_exec_without_a_command(run: Any, words: list[str]) -> None:
    assert run("sandbox", "exec", *words).exit_code == 2


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"exit_code": 0}, 0),
        ({"exit_code": 7}, 7),
        ({"signal": 9}, 137),
        ({"signal": 9, "timed_out": True}, 124),
        ({"timed_out": True}, 124),
    ],
)
def test_exec_exits_as_the_command_did(
    daemon: Any, run: Any, fields: dict[str, Any], code: int
) -> None:
    daemon.answers["ExecuteCommand"] = sandboxes_pb2.ExecuteCommandResponse(**fields)
    assert run("sandbox", "exec", "x", "true").exit_code == code


def test_exec_passes_bytes_through(daemon: Any) -> None:
    raw = bytes(range(256))
    daemon.answers["ExecuteCommand"] = sandboxes_pb2.ExecuteCommandResponse(
        exit_code=3, stdout=raw, stderr=raw[::-1]
    )
    words = ["-m", "stratabox.client.cli", "--address", daemon.address]
    done = subprocess.run(
        [sys.executable, *words, "sandbox", "exec", "x", "cat"], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, raw, raw[::-1])


def test_exec_as_json(daemon: Any, run: Any) -> None:
    reply = sandboxes_pb2.ExecuteCommandResponse(exit_code=1, stdout=b"h\xc3\xa9", stderr=b"\xff")
    reply.duration.FromMilliseconds(250)
    daemon.answers["ExecuteCommand"] = reply
    result = run("sandbox", "exec", "--json", "--cwd", "/tmp", "--env", "A=1", "x", "false")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "exit_code": 1,
        "signal": None,
        "timed_out": False,
        "stdout": "hé",
        "stdout_base64": None,
        "stderr": "\ufffd",
        "stderr_base64": "/w==",
        "out_of_memory": False,
        "disk_full": False,
        "stdout_truncated": False,
        "stderr_truncated": False,
        "duration_seconds": 0.25,
    }
    sent = daemon.last("ExecuteCommand")
    assert (sent.cwd, dict(sent.env)) == ("/tmp", {"A": "1"})


@pytest.mark.parametrize(
    ("code", "reason", "exit_code"),
    [
        (grpc.StatusCode.NOT_FOUND, "SANDBOX_NOT_FOUND", 3),
        (grpc.StatusCode.FAILED_PRECONDITION, "INVALID_STATE", 4),
        (grpc.StatusCode.FAILED_PRECONDITION, "AMBIGUOUS_NAME", 4),
        (grpc.StatusCode.FAILED_PRECONDITION, "QEMU_FAILED", 1),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_RESOURCES", 2),
        (grpc.StatusCode.UNAVAILABLE, "AGENT_UNAVAILABLE", 1),
        (grpc.StatusCode.INTERNAL, "INTERNAL", 1),
    ],
)
def test_errors(
    daemon: Any, run: Any, make: Any, code: grpc.StatusCode, reason: str, exit_code: int
) -> None:
    daemon.answers["GetSandbox"] = make.refusal(code, reason, EVIL, {"k": "v"})
    result = run("sandbox", "get", "x")
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr.startswith(r"error: \x1b[31m")
    result = run("--json", "sandbox", "get", "x")
    assert result.exit_code == exit_code
    assert json.loads(result.stderr) == {
        "error": {"reason": reason, "message": EVIL, "metadata": {"k": "v"}}
    }


def test_no_daemon(run: Any) -> None:
    result = run("sandbox", "list", "--address", "unix:///nowhere/api.sock")
    assert result.exit_code == 5
    assert "unix:///nowhere/api.sock" in result.stderr
    assert "hint: " in result.stderr
    assert run("--address", "nonsense", "sandbox", "list").exit_code == 2


def test_pause_to_disk_and_resume(daemon: Any, run: Any, make: Any) -> None:
    parked = make.sandbox(
        state=records_pb2.SANDBOX_STATE_PAUSED, paused_to_disk=True, memory_bytes=3 << 20
    )
    daemon.answers |= {"PauseSandbox": parked, "ResumeSandbox": make.sandbox()}
    shown = run("sandbox", "pause", "debugbox", "--to-disk")
    assert daemon.last("PauseSandbox").to_disk
    assert "3.0 MiB" in shown.stdout
    body = json.loads(run("sandbox", "pause", "debugbox", "--json").stdout)
    assert not daemon.last("PauseSandbox").to_disk
    assert (body["paused_to_disk"], body["memory_bytes"]) == (True, 3 << 20)
    assert (body["expires_at"], body["on_timeout"]) == (None, "terminate")
    run("sandbox", "resume", "debugbox", "--ready-timeout", "5s")
    sent = daemon.last("ResumeSandbox")
    assert (sent.wait_for_ready, sent.ready_timeout.seconds) == (True, 5)


def test_limits_of_time(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers |= {"CreateSandbox": make.sandbox(), "UpdateSandbox": make.sandbox()}
    before = time.time()
    run("sandbox", "create", "--timeout", "2h", "--on-timeout", "pause")
    sent = daemon.last("CreateSandbox")
    assert 0 <= sent.expires_at.seconds - int(before) - 7200 <= time.time() - before + 1
    assert sent.on_timeout == records_pb2.TIMEOUT_ACTION_PAUSE
    run("sandbox", "create", "--expires-at", "2036-03-20T12:00:00Z")
    sent = daemon.last("CreateSandbox")
    assert sent.expires_at.ToJsonString() == "2036-03-20T12:00:00Z"
    assert sent.on_timeout == records_pb2.TIMEOUT_ACTION_UNSPECIFIED
    both = run("sandbox", "create", "--timeout", "1s", "--expires-at", "2036-03-20T12:00:00Z")
    assert both.exit_code == 2
    run("sandbox", "update", "debugbox", "--clear", "expires_at", "--on-timeout", "terminate")
    sent = daemon.last("UpdateSandbox")
    assert sorted(sent.update_mask.paths) == ["expires_at", "on_timeout"]
    assert not sent.sandbox.HasField("expires_at")
    run("sandbox", "update", "debugbox", "--timeout", "1h")
    sent = daemon.last("UpdateSandbox")
    assert list(sent.update_mask.paths) == ["expires_at"]
    assert sent.sandbox.HasField("expires_at")
