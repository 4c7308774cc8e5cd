"""Cloud images and their seeds, clones' volumes, and what a guest was short of, on the CLI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stratabox.v1 import sandboxes_pb2


def test_user_data_and_keys_go_as_they_are(
    daemon: Any, run: Any, make: Any, tmp_path: Path
) -> None:
    daemon.answers["CreateSandbox"] = make.sandbox()
    (tmp_path / "data").write_bytes(b"#!/bin/sh\n\xff\0")
    (tmp_path / "one.pub").write_text("ssh-ed25519 AAAA me\n")
    (tmp_path / "more").write_text("# mine\n\nssh-rsa BBBB\n  ssh-rsa CCCC you\n")
    words = ["--user-data", "data", "--ssh-key", "one.pub", "--ssh-key", "more"]
    words = [str(tmp_path / word) if not word.startswith("--") else word for word in words]
    result = run("sandbox", "create", "--image", "cloud", *words)
    assert result.exit_code == 0, result.stderr
    sent = daemon.last("CreateSandbox")
    assert sent.user_data == b"#!/bin/sh\n\xff\0"
    assert list(sent.ssh_keys) == ["ssh-ed25519 AAAA me", "ssh-rsa BBBB", "ssh-rsa CCCC you"]
    missing = run("sandbox", "create", "--user-data", str(tmp_path / "none"))
    assert missing.exit_code == 2


def test_an_image_is_said_to_run_cloud_init(
    daemon: Any, run: Any, make: Any, tmp_path: Path
) -> None:
    daemon.answers["ImportImage"] = make.image(cloud_init=True)
    file = tmp_path / "disk.raw"
    file.write_bytes(bytes(512))
    result = run("image", "import", str(file), "--name", "cloud", "--cloud-init", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["cloud_init"] is True
    assert daemon.last("ImportImage")[0].header.cloud_init
    archive = run("image", "import", str(file), "--format", "archive", "--cloud-init")
    assert archive.exit_code == 2


def test_clones_get_volumes(daemon: Any, run: Any, make: Any) -> None:
    copy = sandboxes_pb2.CloneResult(sandbox=make.sandbox())
    daemon.answers["CloneSandbox"] = sandboxes_pb2.CloneSandboxResponse(
        snapshot=make.snapshot(), results=[copy]
    )
    words = ["--volume", "data:/data", "--volume", "cache:/cache:ro"]
    result = run("sandbox", "clone", "box", *words)
    assert result.exit_code == 0, result.stderr
    sent = daemon.last("CloneSandbox").volumes
    assert [(each.volume, each.path, each.read_only) for each in sent] == [
        ("data", "/data", False),
        ("cache", "/cache", True),
    ]


def test_what_a_guest_was_short_of(daemon: Any, run: Any) -> None:
    daemon.answers["ExecuteCommand"] = sandboxes_pb2.ExecuteCommandResponse(
        signal=9, out_of_memory=True
    )
    result = run("sandbox", "exec", "box", "true")
    assert result.exit_code == 128 + 9
    assert "no memory left" in result.stderr
    daemon.answers["ExecuteCommand"] = sandboxes_pb2.ExecuteCommandResponse(
        exit_code=1, disk_full=True
    )
    result = run("sandbox", "exec", "--json", "box", "true")
    assert (result.exit_code, json.loads(result.stdout)["disk_full"]) == (1, True)
