"""What the calls mean: statuses, limits, names, commands, pages; and what is refused, and how."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratabox.client import SandboxState
from support.rest import Rest
from support.waiting import until


@pytest.fixture(scope="module")
def copy(rest: Rest, box: str) -> Iterator[str]:
    """Id of a quick clone of the shared box, for tests that stop it and worse."""
    made = rest("POST", f"/v1/sandboxes/{box}/clone", {"quick": True, "image": "tiny"})
    assert made.status == 201, made
    sandbox, snapshot = made.json["sandbox"], made.json["snapshot"]
    assert snapshot["consistency"] == "crash"
    assert sandbox["status"] == "creating"
    assert sandbox["name"]  # made up
    assert snapshot["name"]
    yield sandbox["id"]
    rest("DELETE", f"/v1/snapshots/{snapshot['id']}")


def test_a_sandbox_reaches_the_public_network(rest: Rest, box: str, copy: str) -> None:
    for sandbox in (box, copy):
        network = rest.client.sandboxes.get(sandbox).network
        assert (network.mode, list(network.allow)) == ("egress", ["public"])


def test_an_image_other_than_the_sources_is_refused(rest: Rest, box: str, tmp_path: Path) -> None:
    disk = tmp_path / "other.raw"
    disk.write_bytes(bytes(1 << 20))
    rest.client.images.import_file(disk, name="other")
    clone = f"/v1/sandboxes/{box}/clone"
    before = rest("GET", "/v1/snapshots/list").json
    answer = rest("POST", clone, {"image": "other"})
    assert (answer.status, answer.code) == (422, "IMAGE_FIXED")
    assert "its source's disks" in answer.json["error"]["message"]
    assert answer.json["error"]["details"]["fixed"] == "tiny"
    assert rest("POST", clone, {"image": "debian"}).code == "IMAGE_NOT_FOUND"
    assert rest("GET", "/v1/snapshots/list").json == before
    rest.client.images.delete("other")


def test_the_words_for_what_a_sandbox_does(rest: Rest, box: str, copy: str) -> None:
    def status(sandbox: str) -> str:
        word: str = rest("GET", f"/v1/sandboxes/{sandbox}").json["status"]
        return word

    assert status(box) == "ready"
    assert rest("POST", f"/v1/sandboxes/{box}/pause").json["status"] == "paused"
    assert status(box) == "paused"
    for call, body in (("execute", {"command": "true"}), ("snapshot", {}), ("clone", {})):
        answer = rest("POST", f"/v1/sandboxes/{box}/{call}", body)
        assert (answer.status, answer.code) == (409, "INVALID_STATE"), call
        assert "paused" in answer.json["error"]["message"]
    assert rest("POST", f"/v1/sandboxes/{box}/resume").json["status"] == "ready"
    assert rest.sh(box, "echo on") == "on"

    theirs = rest.client.sandboxes.get(copy)
    theirs.stop(force=True)
    assert status(copy) == "stopped"
    theirs.start(wait_for_ready=False)
    assert status(copy) == "creating"
    rest.daemon.kill_guest(copy)
    until(rest.client, copy, lambda record: record.state is SandboxState.FAILED)
    assert status(copy) == "failed"
    rest.client.sandboxes.get(copy).terminate()  # its record stays, elsewhere
    assert rest("GET", f"/v1/sandboxes/{copy}").code == "SANDBOX_NOT_FOUND"
    assert copy not in {each["id"] for each in rest("GET", "/v1/sandboxes/list").json}
    assert rest("DELETE", f"/v1/sandboxes/{copy}").json == {"id": copy}


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        ({"cpus": 0}, "cpus"),
        ({"cpus": 33}, "cpus"),
        ({"memory": 127}, "memory"),
        ({"memory": 32769}, "memory"),
        ({"cpus": "2"}, "cpus"),
        ({"cpus": 1.5}, "cpus"),
        ({"cpus": True}, "cpus"),
        ({"storage": 20}, "storage"),
        ({"disk": 20}, "disk"),
    ],
)
def test_resources_out_of_range_are_refused_by_name(
    rest: Rest, box: str, resources: dict[str, object], field: str
) -> None:
    answer = rest("POST", f"/v1/sandboxes/{box}/clone", {"resources": resources})
    assert (answer.status, answer.code) == (400, "INVALID_ARGUMENT")
    assert answer.json["error"]["details"] == {"field": f"body.resources.{field}"}
    if field == "storage":
        assert "its source's" in answer.json["error"]["message"]


def test_a_disk_cannot_shrink(rest: Rest, box: str) -> None:
    made = rest("POST", f"/v1/sandboxes/{box}/snapshot", {"quick": True}).json
    answer = rest("POST", f"/v1/snapshots/{made['id']}/restore", {"resources": {"storage": 65537}})
    assert answer.status == 400
    rest.client.sandboxes.create(snapshot=made["id"], storage=3, wait_for_ready=False).snapshot(
        name="large"
    )
    answer = rest("POST", "/v1/snapshots/large/restore", {"resources": {"storage": 2}})
    assert (answer.status, answer.code) == (422, "INVALID_RESOURCES")
    assert "3 GiB" in answer.json["error"]["message"]
    for snapshot in (made["id"], "large"):
        assert rest("DELETE", f"/v1/snapshots/{snapshot}").status == 200
    for sandbox in rest.client.sandboxes.list():
        if sandbox.id != box:
            sandbox.delete()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'"a"', 400),
        (b"\xff\xfe", 400),
        (b'{"command": "x", "x": 1}', 400),
        (b'{"command": ""}', 400),
        (b'{"command": "a\\u0000b"}', 400),
        (b'{"command": "\\ud800"}', 400),
        (b'{"command": 1}', 400),
        (b'{"command": "x", "timeout": NaN}', 400),
        (b'{"command": "x", "timeout": 1e999}', 400),
        (b'{"command": "x", "timeout": ' + b"9" * 5000 + b"}", 400),
        (b"[" * 100_000, 400),
        (b'{"command": "' + b"x" * (1 << 20) + b'"}', 413),
        (b'{"command": "x", "env": {"A=B": ""}}', 400),
        (b'{"command": "x", "env": {"A": "\\u0000"}}', 400),
    ],
)
def test_bodies_that_cannot_be(rest: Rest, box: str, body: bytes, status: int) -> None:
    answer = rest(
        "POST", f"/v1/sandboxes/{box}/execute", body, headers={"content-type": "application/json"}
    )
    assert answer.status == status, answer
    assert set(answer.json) == {"error"}
    assert set(answer.json["error"]) == {"code", "message", "details"}
    assert len(answer.body) < 2000


def test_names_that_cannot_be(rest: Rest, box: str) -> None:
    for name in ("", " ", "a/b", "a\\b", "\n", "a\x85", "x" * 256):
        answer = rest("POST", f"/v1/sandboxes/{box}/snapshot", {"name": name})
        assert (answer.status, answer.code) == (400, "INVALID_ARGUMENT"), name
    answer = rest("POST", f"/v1/sandboxes/{box}/snapshot", {"name": "\U0001f980" * 64})
    assert answer.status == 422  # 256 bytes: no pattern can count those


def test_what_is_not_there(rest: Rest) -> None:
    for verb, path, code, status in (
        ("GET", "/v1/sandboxes/none", "SANDBOX_NOT_FOUND", 404),
        ("GET", "/v1/snapshots/none", "SNAPSHOT_NOT_FOUND", 404),
        ("POST", "/v1/snapshots/none/restore", "SNAPSHOT_NOT_FOUND", 404),
        ("GET", "/v1/volumes", "PATH_NOT_FOUND", 404),
        ("GET", "/", "PATH_NOT_FOUND", 404),
        ("GET", "/v1/sandboxes/", "PATH_NOT_FOUND", 404),
        ("GET", "/v1/sandboxes/a%2Fb/execute", "PATH_NOT_FOUND", 404),
        ("PUT", "/v1/sandboxes/none", "METHOD_NOT_ALLOWED", 405),
        ("DELETE", "/v1/sandboxes/list", "METHOD_NOT_ALLOWED", 405),
        ("POST", "/v1/snapshots/list", "METHOD_NOT_ALLOWED", 405),
    ):
        answer = rest(verb, path)
        assert (answer.code, answer.status) == (code, status), path
        if status == 405:
            expected = "GET" if path.endswith("list") else "DELETE, GET"
            assert answer.headers["allow"] == expected
    assert rest("POST", "/v1/sandboxes", {"image": "nope"}).code == "IMAGE_NOT_FOUND"


def test_the_same_request_again_makes_nothing_new(rest: Rest, box: str) -> None:
    path, headers = f"/v1/sandboxes/{box}/snapshot", {"idempotency-key": "once"}
    first = rest("POST", path, {"name": "one"}, headers=headers)
    assert rest("POST", path, {"name": "one"}, headers=headers).json == first.json
    other = rest("POST", path, {"name": "two"}, headers=headers)
    assert (other.status, other.code) == (409, "IDEMPOTENCY_MISMATCH")
    assert rest("GET", "/v1/snapshots/one").json == first.json  # the only one of that name
    assert rest("DELETE", "/v1/snapshots/one").status == 200


def test_lists_come_in_pages(rest: Rest, box: str) -> None:
    snapshot = f"/v1/sandboxes/{box}/snapshot"
    made = [rest("POST", snapshot, {"quick": True}).json for _ in range(3)]
    assert rest("GET", "/v1/snapshots/list").json[:3] == made[::-1]
    seen: list[object] = []
    path = "/v1/snapshots/list?page_size=1"
    while path and len(seen) < 3:
        answer = rest("GET", path)
        seen += answer.json
        link = answer.headers.get("link", "")
        path, _, relation = link.partition(">; ")
        assert not link or relation == 'rel="next"'
        path = path.removeprefix("<")
    assert seen == made[::-1]
    assert rest("GET", "/v1/snapshots/list?page_token=x").status == 422
    assert rest("GET", "/v1/snapshots/list?page_size=0").status == 400
    for each in made:
        rest("DELETE", f"/v1/snapshots/{each['id']}")


def test_commands(rest: Rest, box: str) -> None:
    def execute(**body: object) -> dict[str, object]:
        answer = rest("POST", f"/v1/sandboxes/{box}/execute", body)
        assert answer.status == 200, answer
        found: dict[str, object] = answer.json
        return found

    done = execute(command='echo "$A $PWD"; echo to-stderr >&2; exit 3', env={"A": "b"}, cwd="/tmp")
    assert isinstance(done.pop("duration_ms"), int)
    assert done == {
        "exit_code": 3,
        "signal": None,
        "stdout": "b /tmp\n",
        "stderr": "to-stderr\n",
        "stdout_truncated": False,
        "stderr_truncated": False,
        "timed_out": False,
    }
    late = execute(command="echo begun; sleep 1000", timeout=3)
    assert late["timed_out"] is True
    assert late["stdout"] == "begun\n"
    assert execute(command="kill -9 $$")["signal"] == 9
    assert execute(command="printf '\\377\\303\\266\\000'")["stdout"] == "�ö\0"
    # Characters that the pieces, in which it is sent, cut in two.
    text = "ö€\U0001f980" * 100_000
    script = "head -c 900000 /dev/zero | tr '\\0' x; printf y"
    assert execute(command=script)["stdout"] == "x" * 900_000 + "y"
    packed = base64.b64encode(text.encode()[:60_000]).decode()
    assert execute(command=f"echo {packed} | base64 -d")["stdout"] == text.encode()[:60_000].decode(
        errors="replace"
    )


def test_the_document_describes_every_endpoint(rest: Rest) -> None:
    document = json.loads(rest("GET", "/v1/openapi.json", key="").body)
    assert document["openapi"].startswith("3.1")
    assert document["components"]["securitySchemes"]["APIKeyHeader"]["name"] == "x-api-key"
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["security"] == [{"APIKeyHeader": []}]
            assert {"400", "401", "403", "429", "500", "503"} <= set(operation["responses"])
