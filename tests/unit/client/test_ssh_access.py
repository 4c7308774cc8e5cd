"""What stock ssh is told, and how ends of ports are written."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stratabox.client import Endpoint, InvalidArgumentError, SandboxRecord, _convert, ssh_access
from stratabox.client._ports import parse, parse_pair

BOX = "11111111-2222-4333-8444-555555555555"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIG1a0lnF7c6zkBHd90CzW69AyS+meZsnVl3vk8uHf"


@pytest.mark.parametrize(
    ("text", "listens", "target"),
    [
        ("80", None, Endpoint(port=80)),
        ("127.0.0.1:80", None, Endpoint(address="127.0.0.1", port=80)),
        ("localhost:80", None, Endpoint(address="localhost", port=80)),
        ("8080:80", Endpoint(port=8080), Endpoint(port=80)),
        ("0.0.0.0:8080:80", Endpoint(address="0.0.0.0", port=8080), Endpoint(port=80)),
        ("[::1]:1:[::2]:2", Endpoint(address="::1", port=1), Endpoint(address="::2", port=2)),
        ("8080:10.0.0.1:80", Endpoint(port=8080), Endpoint(address="10.0.0.1", port=80)),
        ("/a b.sock:80", Endpoint(path="/a b.sock"), Endpoint(port=80)),
        ("80:/b.sock", Endpoint(port=80), Endpoint(path="/b.sock")),
        ("/a:/b", Endpoint(path="/a"), Endpoint(path="/b")),
        ("/a", None, Endpoint(path="/a")),
    ],
)
def test_pairs(text: str, listens: Endpoint | None, target: Endpoint) -> None:
    assert parse_pair(text) == (listens, target)
    assert parse(str(target)) in (target, Endpoint(address="127.0.0.1", port=target.port))


@pytest.mark.parametrize("text", ["", "a", ":80", "80:", "1:2:3", "a:b", "80:a", "-1", "a/b", "1 "])
def test_what_is_no_pair(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_pair(text)


def test_the_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    where = tmp_path / "a folder" / "ssh"
    key = ssh_access.identity(where)
    assert key.stat().st_mode & 0o777 == 0o600
    assert where.stat().st_mode & 0o777 == 0o700
    before = key.read_bytes(), ssh_access.public_file(key).read_text()
    assert before[1].startswith("ssh-ed25519 ")
    assert ssh_access.identity(where) == key
    assert (key.read_bytes(), ssh_access.public_file(key).read_text()) == before
    assert sorted(each.name for each in where.iterdir()) == [
        ".lock", "id_ed25519", "id_ed25519.pub",
    ]  # fmt: skip


def test_known_hosts_take_only_host_keys(tmp_path: Path) -> None:
    for told in (["ssh-rsa AAAAB3NzaC1yc2EAAAADAQAB"], [KEY, "x", f"{KEY}\n* {KEY}", "@cert x y"]):
        ssh_access.write_known_hosts(tmp_path, BOX, told)
    file = ssh_access.known_hosts_file(tmp_path, BOX)
    assert file.read_text() == f"stratabox-{BOX} {KEY}\n"
    ssh_access.prune(tmp_path)
    assert file.exists()
    os.utime(file, (1, 1))
    ssh_access.prune(tmp_path)
    assert list(file.parent.iterdir()) == []


def test_ssh_reads_what_is_written(tmp_path: Path) -> None:
    where = tmp_path / "100% o'my \\folder"
    options = ssh_access.options(where, BOX, "unix:///a b/%h/api.sock", "bob")
    file = tmp_path / "config"
    file.write_text("Host x\n" + "".join(f"    {name} {value}\n" for name, value in options))
    asked = subprocess.run(
        ["ssh", "-G", "-F", file, "x"], capture_output=True, text=True, check=True
    ).stdout
    found = dict(line.split(" ", 1) for line in asked.splitlines() if " " in line)
    assert found["hostname"] == BOX
    assert found["user"] == "bob"
    assert found["hostkeyalias"] == f"stratabox-{BOX}"
    assert found["stricthostkeychecking"] in ("true", "yes")
    assert found["proxycommand"].endswith(f"--user '%r' {BOX}")
    assert "'unix:///a b/%%h/api.sock'" in found["proxycommand"]


def test_names_that_cannot_be_hosts(tmp_path: Path, make: Any) -> None:
    def box(number: int, name: str) -> SandboxRecord:
        record = SandboxRecord(**_convert.sandbox_fields(make.sandbox()))
        return replace(record, id=f"{number:08}{BOX[8:]}", name=name)

    odd = ('a "box" *; $(id)', "twin", "twin", "-oProxyCommand=id", "a\n  User x", "ok.box-1")
    boxes = [box(number, name) for number, name in enumerate(odd)]
    boxes.append(box(6, boxes[5].id))  # called as another one's id
    text = ssh_access.config(tmp_path, boxes, "unix:///a")
    hosts = [line.split()[1:] for line in text.splitlines() if line.startswith("Host ")]
    assert hosts == [[each.id] for each in boxes[:5]] + [[boxes[5].id, "ok.box-1"], [boxes[6].id]]
    for name in odd[:4]:
        assert ascii(name) in text
    assert "\n  User x" not in text


def test_the_user_is_root_unless_named(tmp_path: Path) -> None:
    def is_named(*arguments: str) -> bool:
        return "User=root" not in ssh_access.command(tmp_path, BOX, "unix:///a", arguments)

    assert is_named("-l", "bob")
    assert is_named("-vtlbob", "ls")
    assert is_named("-L", "1:a:2", "-o", "User=bob")
    assert not is_named("ls", "-l", "bob")
    assert not is_named("-p", "-l", "bob")
    assert not is_named("--", "-l", "bob")


def test_the_folder(tmp_path: Path) -> None:
    assert ssh_access.folder({"HOME": "/h"}) == Path("/h/.config/stratabox/ssh")
    assert ssh_access.folder({"HOME": "/h", "XDG_CONFIG_HOME": "/c"}) == Path("/c/stratabox/ssh")
    assert ssh_access.folder({"HOME": "/h", "XDG_CONFIG_HOME": "c"}) == Path(
        "/h/.config/stratabox/ssh"
    )
