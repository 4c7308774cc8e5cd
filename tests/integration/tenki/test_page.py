"""Tenki's page about snapshots, line by line: its command lines, as they are printed.

Its TypeScript and what its Go does are in the SDKs' lives (`test_sdks`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stratabox.client import Client, Sandbox
from support.tenki import Tenki

HERE = Path(__file__).parent
# In the place of Debian's, which the tests' small guest has not: they say what they were asked for.
STAND_INS = """\
printf '#!/bin/sh\\necho "apt-get $*" >>/root/asked\\n' >/usr/bin/apt-get
chmod +x /usr/bin/apt-get && ln -sf /bin/sh /bin/bash
"""


class Page:
    """Runs the page's blocks with `alias tenki=stratabox`, a level, and ids for its <...>."""

    def __init__(self, tenki: Tenki) -> None:
        self._environment = {
            **tenki.process.environment, "STRATABOX_DEFAULT_LEVEL": "memory"
        }  # fmt: skip

    def block(self, name: str) -> list[str]:
        """Its commands."""
        text = (HERE / "page" / f"{name}.sh").read_text("utf-8")
        return [each for each in re.split(r"(?m)^(?=tenki )", text) if each.startswith("tenki ")]

    def __call__(self, command: str, **ids: str) -> str:
        for key, value in ids.items():
            command = command.replace(f"<{key}-id>", value)
        assert "<" not in command, command
        alias = f"alias tenki='{sys.executable} -m stratabox.client.cli'"
        done = subprocess.run(
            ["bash", "-c", f"shopt -s expand_aliases\n{alias}\n{command}"],
            env=self._environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def only(self, name: str, **ids: str) -> str:
        """Run a block of one command."""
        (command,) = self.block(name)
        return self(command, **ids)


@pytest.fixture
def client(tenki: Tenki) -> Iterator[Client]:
    with Client(tenki.process.address) as client:
        yield client


def named(client: Client, name: str) -> Sandbox:
    (found,) = client.sandboxes.list(name=name)
    return found


def sh(box: Sandbox, line: str) -> str:
    return box.execute(line).check().stdout_text.strip()


def test_the_command_lines_of_the_page(tenki: Tenki, client: Client) -> None:
    page = Page(tenki)
    create, execute, take, terminate, restore = page.block("save_point")
    page(create)
    box = named(client, "debugbox")
    sh(box, STAND_INS)
    pid = sh(box, "sleep 100000 >/dev/null 2>&1 </dev/null & echo $!")
    page(execute, session=box.id)
    page(take, session=box.id)
    (with_strace,) = client.snapshots.list(name="with-strace")
    assert with_strace.consistency == "memory"

    assert "baseline" in page.only("create", session=box.id)
    # The page's date has passed.
    (command,) = page.block("create_with_expiration")
    later = (datetime.now(UTC) + timedelta(days=30)).strftime("%Y-%m-%dT12:00:00Z")
    page(command.replace("2026-03-20T12:00:00Z", later), session=box.id)
    (upgrade,) = client.snapshots.list(name="before-upgrade")
    assert upgrade.expires_at == datetime.fromisoformat(later)
    page(terminate, session=box.id)
    assert client.sandboxes.get(box.id).state == "terminated"

    page(restore, snapshot=with_strace.id)
    restored = named(client, "debugbox-restored")
    assert sh(restored, f"kill -0 {pid} && cat /root/asked").splitlines() == [
        "apt-get update", "apt-get install -y strace",
    ]  # fmt: skip

    (baseline,) = client.snapshots.list(name="baseline")
    listing, listing_json, get, delete = page.block("list_inspect_delete")
    assert {"baseline", "before-upgrade", "with-strace"} <= set(page(listing).split())
    assert baseline.id in {each["id"] for each in json.loads(page(listing_json))["snapshots"]}
    assert baseline.id in page(get, snapshot=baseline.id)
    page(delete, snapshot=baseline.id)
    assert client.snapshots.list(name="baseline") == []

    page.only("restore", snapshot=upgrade.id)
    named(client, "restored-copy").delete()
    page.only("restore_without_volumes", snapshot=upgrade.id)
    copy = named(client, "restored-copy")
    before = {each.id for each in client.sandboxes.list()}
    page.only("restore_by_create", snapshot=upgrade.id)
    volume = client.volumes.create("cache", size_bytes=16 << 20)
    page.only("restore_with_volume", snapshot=upgrade.id, volume=volume.id)
    made = [each for each in client.sandboxes.list() if each.id not in before]
    assert len(made) == 2
    for each in (restored, copy, *made):
        assert sh(each, f"kill -0 {pid}; echo $?") == "0"  # none of them has booted
    assert sorted(sh(each, "grep -c /workspace/cache /proc/mounts; true") for each in made) == [
        "0", "1",
    ]  # fmt: skip
    for each in (restored, copy, *made):
        each.delete()
    client.volumes.delete(volume.id)
    for snapshot in (upgrade, with_strace):
        client.snapshots.delete(snapshot.id)
