"""Akira's page, line by line: its curl lines and its TypeScript, as they are printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.rest import Rest

HERE = Path(__file__).parent
Told = dict[str, list[dict[str, Any]]]
"""Each block's calls."""
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
SANDBOX_FIELDS = ["id", "name", "created_at", "cpu", "memory", "storage", "status"]
SNAPSHOT_FIELDS = [
    "id", "name", "source_sandbox_id", "source_sandbox_name", "status", "created_at", "consistency",
]  # fmt: skip


class Curl:
    """Runs the page's lines with another host and key."""

    def __init__(self, rest: Rest) -> None:
        self._rest = rest

    def __call__(self, name: str, **ids: str) -> Any:
        line = (HERE / "page" / f"{name}.sh").read_text()
        line = line.replace("https://api.akiralabs.ai", self._rest.url)
        line = line.replace("YOUR_API_KEY", self._rest.key)
        for placeholder, value in ids.items():
            line = line.replace(f"{{{placeholder}}}", value)
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=300, check=True
        )
        return json.loads(done.stdout)


def test_the_curl_lines_of_the_page(rest: Rest, box: str) -> None:
    curl = Curl(rest)
    rest.sh(box, "echo before >/root/page")
    snapshot = curl("create_snapshot", sandbox_id=box)
    assert list(snapshot) == SNAPSHOT_FIELDS
    assert (snapshot["name"], snapshot["status"]) == ("my-backup", "ready")
    assert snapshot["consistency"] == "application"
    assert snapshot["source_sandbox_id"] == box
    rest.sh(box, "echo after >/root/page")

    listed = curl("list_snapshots")
    assert snapshot in listed

    restored = curl("restore_snapshot", snapshot_id=snapshot["id"])
    assert list(restored) == SANDBOX_FIELDS
    assert (restored["name"], restored["status"]) == ("restored-sandbox", "creating")
    # Whoever uses it at once is made to wait until it can be used.
    assert rest.sh(restored["id"], "cat /root/page") == "before"

    clone = curl("clone_sandbox", sandbox_id=box)
    assert list(clone) == ["sandbox", "snapshot"]
    copy, between = clone["sandbox"], clone["snapshot"]
    assert list(copy) == SANDBOX_FIELDS
    assert list(between) == SNAPSHOT_FIELDS
    assert UUID.fullmatch(copy["id"])
    assert TIME.fullmatch(copy["created_at"])
    source = rest("GET", f"/v1/sandboxes/{box}").json
    assert copy | {"id": "", "created_at": ""} == {
        "id": "",
        "name": "my-cloned-sandbox",
        "created_at": "",
        "cpu": 2,
        "memory": 1024,
        "storage": source["storage"],
        "status": "creating",
    }
    assert UUID.fullmatch(between["id"])
    assert TIME.fullmatch(between["created_at"])
    assert between | {"id": "", "created_at": ""} == {
        "id": "",
        "name": "clone-backup-1",
        "source_sandbox_id": box,
        "source_sandbox_name": source["name"],
        "status": "ready",
        "created_at": "",
        "consistency": "application",
    }
    assert rest.sh(copy["id"], "cat /root/page") == "after"

    assert curl("delete_snapshot", snapshot_id=snapshot["id"]) == {"id": snapshot["id"]}
    assert snapshot not in curl("list_snapshots")
    assert rest("DELETE", f"/v1/snapshots/{snapshot['id']}").code == "SNAPSHOT_NOT_FOUND"
    for sandbox in (restored["id"], copy["id"]):
        assert rest("DELETE", f"/v1/sandboxes/{sandbox}").status == 200
        assert rest("GET", f"/v1/sandboxes/{sandbox}").code == "SANDBOX_NOT_FOUND"


@pytest.fixture(scope="module")
def told(rest: Rest, box: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Run all of the page's TypeScript in Node; the calls of each block."""
    folder = tmp_path_factory.mktemp("node")
    package = folder / "node_modules" / "@akiralabs" / "sandbox-sdk"
    package.mkdir(parents=True)
    manifest = {"name": "@akiralabs/sandbox-sdk", "type": "module", "exports": "./sdk.mjs"}
    (package / "package.json").write_text(json.dumps(manifest))
    (package / "sdk.mjs").write_text((HERE / "node" / "sdk.mjs").read_text())
    (folder / "run.mjs").write_text((HERE / "node" / "run.mjs").read_text())
    environment = {**os.environ, "AKIRA_API_KEY": rest.key, "AKIRA_BASE_URL": rest.url}
    done = subprocess.run(
        ["node", "run.mjs", str(HERE / "page"), box],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    yield json.loads((folder / "calls.json").read_text())
    for sandbox in rest.client.sandboxes.list():
        if sandbox.id != box:
            sandbox.delete()


def test_snapshots_restores_and_clones_of_the_page(told: Told, box: str) -> None:
    assert told["create_snapshot"][0]["reply"]["consistency"] == "crash"  # quick: true
    assert told["create_snapshot"][0]["reply"] in told["list_snapshots"][0]["reply"]
    assert told["restore"][0]["reply"]["status"] == "creating"
    restored = told["restore_with_options"][0]["reply"]
    assert [restored[key] for key in ("cpu", "memory", "status")] == [2, 4096, "ready"]
    cloned = told["clone"][0]["reply"]
    assert cloned["sandbox"]["name"] == "sandbox-clone"
    assert cloned["sandbox"]["status"] == "creating"
    made = told["clone_with_options"][0]["reply"]
    assert [made["sandbox"][key] for key in SANDBOX_FIELDS[3:]] == [4, 8192, 1, "ready"]
    assert made["snapshot"]["name"] == "clone-backup-1"
    assert made["snapshot"]["source_sandbox_id"] == box
    assert told["delete_snapshot"][0]["status"] == 200


def test_a_deployment_that_fails_is_rolled_back(told: Told) -> None:
    backup, deploy, restore = told["pre_deployment_backup"][:3]
    assert deploy["reply"]["exit_code"] == 127  # there is no ./deploy.sh
    assert "deploy.sh" in deploy["reply"]["stderr"]
    assert backup["reply"]["name"].startswith("pre-deploy-")
    assert restore["reply"]["name"] == "restored-from-backup"


def test_templates_and_branches_have_what_their_base_had(told: Told, rest: Rest) -> None:
    new = told["environment_templates"][-1]["reply"]
    assert new["name"] == "new-dev-environment"
    assert rest.sh(new["id"], "cat /root/asked").splitlines() == [
        "apt-get update",
        "apt-get install -y vim git nodejs",
        "npm install -g typescript eslint prettier",
    ]
    for letter, version in (("a", "v1"), ("b", "v2")):
        (branch,) = (
            each["reply"]
            for each in told["experiment_branching"]
            if each["reply"].get("name") == f"experiment-branch-{letter}"
        )
        assert rest.sh(branch["id"], "cat /root/asked").splitlines() == [
            "pip install torch numpy pandas",
            f"python train_{version}.py",
        ]


def test_clones_work_side_by_side_and_are_gone_afterwards(told: Told, rest: Rest) -> None:
    calls = told["parallel_clones"]
    clones = {
        each["reply"]["sandbox"]["id"]: each["reply"]["sandbox"]
        for each in calls
        if each["path"].endswith("/clone")
    }
    assert sorted(each["name"] for each in clones.values()) == [f"worker-{n}" for n in range(4)]
    assert {each["status"] for each in clones.values()} == {"ready"}
    outputs = {
        clones[each["path"].split("/")[3]]["name"]: each["reply"]["stdout"]
        for each in calls
        if each["path"].endswith("/execute") and each["path"].split("/")[3] in clones
    }
    assert outputs == {f"worker-{n}": f"python process.py data{n + 1}.csv\n" for n in range(4)}
    assert not {sandbox.id for sandbox in rest.client.sandboxes.list()} & set(clones)
