"""What Prometheus is told, what events tell, and how a request is found in logs and the audit."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stratabox.client import Client, EventType, Happened
from stratabox.client.errors import SandboxNotFoundError, StrataboxError
from stratabox.v1 import sandboxes_pb2, sandboxes_pb2_grpc
from support.certificates import Authority
from support.daemon import DaemonProcess, daemon
from support.doors import free_port, run
from support.rest import make_key
from support.rig import eventually

pytestmark = pytest.mark.guest

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Watched:
    """A daemon that tells Prometheus."""

    def __init__(self, process: DaemonProcess, client: Client, port: int, rest: int) -> None:
        self.process, self.client, self.port, self.rest = process, client, port, rest

    def get(self, path: str = "/metrics", **headers: str) -> tuple[int, str]:
        """Ask, and return the status and the body."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as to:
            to.request("GET", path, headers=headers)
            answer = to.getresponse()
            return answer.status, answer.read().decode()

    def samples(self) -> Samples:
        """All figures, as Prometheus's own parser reads them."""
        status, text = self.get()
        assert status == 200, text
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def audited(self, request: str) -> list[Any]:
        """Lines of the audit log about a request."""
        self.process.stop()
        found = []
        for name in ("calls", "refused"):
            path = self.process.state / "audit" / f"{name}.jsonl"
            if path.exists():
                found += [json.loads(line) for line in path.read_text().splitlines()]
        return [each for each in found if each.get("request") == request]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    port, rest = free_port(), free_port()
    settings = {
        "STRATABOX_METRICS": f"127.0.0.1:{port}",
        "STRATABOX_REST": f"http://127.0.0.1:{rest}",
        "STRATABOX_LOG_FORMAT": "json",
        "STRATABOX_LOG_LEVEL": "debug",
        "STRATABOX_DEFAULT_MEMORY": "192",
    }
    with (
        daemon(tmp_path_factory.mktemp("watched"), settings) as process,
        process.start() as client,
    ):
        client.images.build_tiny()
        yield Watched(process, client, port, rest)


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


def test_what_happens_is_counted(watched: Watched) -> None:
    client = watched.client
    before = watched.samples()
    box = client.sandboxes.create(image="tiny", name="nobodys-label")
    disk = box.snapshot()
    memory = box.snapshot(level="memory")
    copy = client.snapshots.restore(memory.id)
    with pytest.raises(SandboxNotFoundError):
        client.sandboxes.get("nobody")
    # What is there is looked at once a second at most; what has happened is counted at once.
    eventually(lambda: of(watched.samples(), "stratabox_sandboxes", state="running") == 2)
    after = watched.samples()

    def grew(name: str, **labels: str) -> float:
        return of(after, name, **labels) - of(before, name, **labels)

    api = "stratabox.v1.SandboxesService/"
    create, get = f"{api}CreateSandbox", f"{api}GetSandbox"
    assert grew("stratabox_calls_total", method=create, result="OK") == 1
    assert grew("stratabox_call_seconds_count", method=create) == 1
    assert grew("stratabox_call_seconds_sum", method=create) > 0.1
    assert grew("stratabox_failures_total", method=get, reason="SANDBOX_NOT_FOUND") == 1
    assert of(after, "stratabox_sandboxes", state="running") == 2
    assert of(after, "stratabox_guest_memory_bytes") == 2 * 192 << 20
    for level in ("application", "memory"):
        assert grew("stratabox_snapshots_taken_total", level=level, result="ready") == 1
        assert grew("stratabox_snapshot_stall_seconds_count", level=level) == 1
    assert disk.stall is not None
    assert grew("stratabox_snapshot_stall_seconds_sum", level="application") == pytest.approx(
        disk.stall.total_seconds(), abs=1e-5
    )
    assert grew("stratabox_snapshot_pause_seconds_count") == 1
    assert grew("stratabox_snapshot_bytes_total", kind="memory") > 1 << 20
    assert grew("stratabox_snapshot_bytes_total", kind="layers") > 0
    assert grew("stratabox_ready_seconds_count", start="boot") == 1
    assert grew("stratabox_ready_seconds_count", start="memory") == 1
    # The image's layer, one for each snapshot, and the overlay.
    assert of(after, "stratabox_chain_layers_max") == 4
    assert of(after, "stratabox_saved_memory_bytes") > 1 << 20
    assert of(after, "stratabox_store_bytes") > of(before, "stratabox_store_bytes") > 0
    assert of(after, "stratabox_disk_bytes") > of(after, "stratabox_disk_free_bytes") > 0
    assert of(after, "process_resident_memory_bytes") > 1 << 20
    text = watched.get()[1]
    for secretish in (box.name, box.id, copy.id, disk.id):
        assert secretish not in text
    box.delete()
    copy.delete()


def test_events_tell_what_happens(watched: Watched) -> None:
    client = watched.client
    seen: queue.Queue[Happened] = queue.Queue()
    began = datetime.now(UTC)
    following = client.events.watch(follow=True, since=began)
    reader = threading.Thread(target=lambda: _read(following, seen), daemon=True)
    reader.start()
    volume = client.volumes.create("told", size_bytes=64 << 20)
    box = client.sandboxes.create(image="tiny", paused=True)
    client.volumes.delete(volume.id)
    box.delete()
    found = [seen.get(timeout=60)]
    while (found[-1].id, found[-1].type) != (box.id, EventType.DELETED):
        found.append(seen.get(timeout=60))

    def of_it(id: str) -> list[tuple[str, str]]:
        return [(each.type, each.state) for each in found if each.id == id]

    assert of_it(volume.id) == [
        ("created", "creating"), ("updated", "ready"), ("deleted", "ready"),
    ]  # fmt: skip
    states = of_it(box.id)
    assert states[0] == ("created", "creating")
    assert ("updated", "terminated") in states
    requests = {each.request_id for each in found if each.id == volume.id}
    assert len(requests) == 2
    assert None not in requests  # the creation's and the deletion's
    assert [each.time for each in found] == sorted(each.time for each in found)

    # What is remembered is the same, and ends.
    again = list(client.events.watch(["volume", "sandbox"], since=began, follow=False))
    assert [each for each in again if each.id in (volume.id, box.id)] == [
        each for each in found if each.id in (volume.id, box.id)
    ]
    assert list(client.events.watch(["job"], since=datetime.now(UTC), follow=False)) == []
    done = run(watched.process, "events", "--since", "1h", "--kind", "volume", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["type"] for line in lines if line["id"] == volume.id] == [
        "created", "updated", "deleted",
    ]  # fmt: skip
    text = run(watched.process, "events", "--kind", "volume").stdout
    assert f"told  new, creating  {volume.id}" in text
    assert run(watched.process, "events", "--since", "soon").returncode == 2


def _read(events: Iterator[Happened], seen: queue.Queue[Happened]) -> None:
    with contextlib.suppress(StrataboxError):  # the daemon ends
        for each in events:
            seen.put(each)


def test_who_asks_wrongly(watched: Watched) -> None:
    assert watched.get("/")[0] == 404
    # A page in a browser here that has its own name lead to loopback.
    assert watched.get(host="evil.example")[0] == 421
    assert watched.get(host=f"localhost:{watched.port}")[0] == 200


def test_a_request_is_followed(watched: Watched) -> None:
    id = "test/follow-1"
    with grpc.insecure_channel(watched.process.address.replace("unix://", "unix:")) as channel:
        stub = sandboxes_pb2_grpc.SandboxesServiceStub(channel)
        request = sandboxes_pb2.ListSandboxesRequest()
        _, call = stub.ListSandboxes.with_call(request, metadata=(("x-request-id", id),))
        assert dict(call.trailing_metadata())["x-request-id"] == id
        _, call = stub.ListSandboxes.with_call(request)
        assert len(dict(call.trailing_metadata())["x-request-id"]) == 32
        wrong = sandboxes_pb2.GetSandboxRequest(sandbox="nobody")
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetSandbox(wrong, metadata=(("x-request-id", id),))
        failed: Any = caught.value
        trailer = dict(failed.trailing_metadata())
        assert trailer["x-request-id"] == id
        assert "grpc-status-details-bin" in trailer

    key = make_key(watched.process, "--name", "follow")
    with closing(http.client.HTTPConnection("127.0.0.1", watched.rest, timeout=30)) as to:
        for shown, status in ((key, 404), ("nonsense", 401)):
            to.request("GET", "/v1/sandboxes/x", headers={"x-api-key": shown, "x-request-id": id})
            answer = to.getresponse()
            answer.read()
            assert answer.status == status
            assert answer.headers["x-request-id"] == id

    found = watched.audited(id)
    assert {(each.get("result"), each.get("reason")) for each in found} == {
        ("OK", None),
        ("NOT_FOUND", "SANDBOX_NOT_FOUND"),
        (None, "INVALID_KEY"),
    }
    logged = [json.loads(line) for line in watched.process.log.read_text().splitlines()]
    assert {"at", "level", "logger", "message"} <= logged[-1].keys()
    with_id = [each for each in logged if "request" in each]
    assert any("qemu" in each["logger"] or "lifecycle" in each["logger"] for each in with_id)


def test_other_hosts_need_a_key(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    authority, port = Authority(tmp_path), free_port()
    certificate, secret, _ = authority.issue("daemon")
    own_daemon.environment |= {
        "STRATABOX_TLS_CERTIFICATE": str(certificate),
        "STRATABOX_TLS_KEY": str(secret),
        "STRATABOX_METRICS": f"https://0.0.0.0:{port}",
    }
    key = make_key(own_daemon, "--name", "scraper", "--role", "read-only")
    with own_daemon.start():
        for headers, status in (
            ({"accept": "*/*"}, 401),
            ({"authorization": "Bearer nonsense"}, 401),
            ({"authorization": f"Bearer {key}"}, 200),
        ):
            context = ssl.create_default_context(cafile=str(authority.file))
            with closing(
                http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=30)
            ) as to:
                to.request("GET", "/metrics", headers=headers)
                answer = to.getresponse()
                body = answer.read()
                assert answer.status == status
                assert (b"stratabox_calls_open" in body) is (status == 200)
        own_daemon.stop()
