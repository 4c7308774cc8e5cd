"""The whole life of sandboxes with Tenki's own package. Run by test_sdks, in its own process."""

from __future__ import annotations

import re
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import tenki
from tenki import Client, Sandbox

MIB = 1 << 20


@contextmanager
def raises(kind: type[Exception], *words: str) -> Iterator[None]:
    """That very error, and what its text must say."""
    try:
        yield
    except kind as error:
        if type(error) is not kind or not all(word in str(error) for word in words):
            raise
    else:
        raise AssertionError(f"no {kind.__name__}")


def sh(box: Sandbox, line: str) -> str:
    return box.exec("sh", "-c", line, check=True).stdout_text.strip()


def records(client: Client, box: Sandbox) -> None:
    info = box.info
    assert (box.state, info.name, info.cpu_cores, info.memory_mb) == ("RUNNING", "life", 1, 256)
    assert (info.inbound_enabled, info.outbound_enabled, info.sticky) == (True, True, False)
    assert info.metadata == {"purpose": "test"}
    assert info.tags == ("ci", "py")
    assert info.disk_size_gb >= 1
    assert info.timeout_at
    assert timedelta(0) < info.timeout_at - datetime.now(UTC) <= timedelta(hours=1)
    before = info.timeout_at
    box.extend(600)
    assert box.info.timeout_at
    assert box.info.timeout_at - before == timedelta(minutes=10)
    box.update(name="life-renamed", tags=["py", "kept"])
    assert (box.name, set(box.info.tags)) == ("life-renamed", {"py", "kept"})
    assert [each.id for each in client.list(tags=["kept"])] == [box.id]
    assert client.list(tags=["nobody-has-this"]) == []
    assert client.get(box.id).refresh() == box.refresh()
    box.update(sticky=True)
    assert box.id in {each.id for each in client.list(sticky=True)}
    box.update(sticky=False)
    assert box.id not in {each.id for each in client.list(sticky=True)}
    me = client.who_am_i()
    assert me.workspaces
    assert box.info.workspace_id == me.workspaces[0].id
    assert client.get_usage()
    metrics = box.metrics(window=60)
    assert metrics.session_id == box.id
    assert metrics.cpu.limit_cores == 1
    assert metrics.memory.limit_bytes == 256 * MIB


def commands(box: Sandbox) -> None:
    result = box.exec("sh", "-c", "echo out; echo err >&2; exit 3")
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    assert not result.ok
    with raises(tenki.CommandFailedError):
        result.check()
    assert sh(box, "pwd") == "/home/tenki"
    assert sh(box, 'echo "$GREETING $HOME"').split()[0] == "hello"
    assert box.exec("pwd", cwd="/tmp", check=True).stdout_text == "/tmp\n"
    assert box.exec("sh", "-c", "echo $X", env={"X": "1 2"}, check=True).stdout_text == "1 2\n"
    assert box.exec("cat", input="given").stdout == b"given"
    assert box.exec("cat").stdout == b""  # its input is closed at once
    missing = box.exec("there-is-no-such-program")
    assert not missing.ok
    # More than fits anywhere, both ways.
    data = bytes(range(256)) * 4096
    assert box.exec("cat", input=data).stdout == data

    process = box.start("sh", "-c", "read line; echo got $line; cat >/dev/null; echo end >&2")
    assert process.pid
    process.write_stdin("a word\n")
    assert next(iter(process.stdout)) == b"got a word\n"
    process.close_stdin()
    ended = process.wait(60)
    assert (ended.exit_code, ended.stderr) == (0, b"end\n")

    trap = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    process = box.start("sh", "-c", trap)
    assert next(iter(process.stdout)) == b"ready\n"
    process.signal("SIGTERM")
    assert process.wait(60).exit_code == 5
    process = box.start("sleep", "1000")
    assert process.pid
    process.kill()
    killed = process.wait(60)
    assert not killed.ok
    assert killed.signal == "killed"

    late = box.exec("sleep", "1000", timeout=1)
    assert late.timed_out
    assert not late.ok


def files(box: Sandbox) -> None:
    box.fs.write_text("notes.txt", "älter\n")
    assert box.fs.read_text("/home/tenki/notes.txt") == "älter\n"
    assert sh(box, "cat notes.txt") == "älter"
    stat = box.fs.stat("notes.txt")
    assert (stat.size, stat.is_dir) == (7, False)
    box.fs.mkdir("deep/er")
    box.fs.write_bytes("deep/er/.hidden", b"")
    assert [each.path.rpartition("/")[2] for each in box.fs.list("deep")] == ["er"]
    assert box.fs.list("deep/er") == []
    assert [each.is_dir for each in box.fs.list("deep/er", include_hidden=True)] == [False]
    box.fs.remove("deep")
    for call in (box.fs.stat, box.fs.read_bytes, box.fs.list, box.fs.remove):
        with raises(tenki.FileNotFoundError):
            call("deep")
    data = bytes(range(256)) * (5 * MIB // 256)
    box.fs.write_bytes("big", data)
    assert b"".join(box.fs.read_stream("big")) == data
    assert b"".join(box.fs.read_stream("big", offset=MIB, length=100)) == data[:100]
    with tempfile.TemporaryDirectory() as folder:
        here, back = Path(folder, "here"), Path(folder, "back")
        here.write_bytes(data[:100_000])
        box.fs.upload(here, "copy")
        box.fs.download("copy", back)
        assert back.read_bytes() == data[:100_000]
    sh(box, "rm big copy")


def snapshots(client: Client, box: Sandbox) -> None:
    pid = sh(box, "sleep 100000 >/dev/null 2>&1 </dev/null & echo $!")
    box.fs.write_text("state", "before")
    expires_at = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    quick = client.snapshots.create(box.id, name="with-date", expires_at=expires_at)
    assert (quick.session_id, quick.name, quick.expires_at) == (box.id, "with-date", expires_at)
    snapshot = box.snapshot(name="baseline")
    assert (snapshot.state, snapshot.type) == ("READY", "USER")
    assert (snapshot.cpu_cores, snapshot.memory_mb) == (1, 256)
    assert snapshot.size_bytes > 0
    assert snapshot.memory_bytes > 0
    assert client.snapshots.wait_durable(snapshot.id).durability_state == "DURABLE"
    ids = {quick.id, snapshot.id}
    assert ids <= {each.id for each in client.snapshots.list()}
    assert ids == {each.id for each in client.snapshots.list_session(box.id)}
    assert not ids & {each.id for each in client.snapshots.list_dangling()}

    box.fs.write_text("state", "after")
    with client.create(snapshot_id=snapshot.id, name="restored-copy") as restored:
        # The very processes, not a boot.
        assert sh(restored, f"kill -0 {pid} && cat state") == "before"
        assert restored.info.source_snapshot_id == snapshot.id
        assert restored.id != box.id
    assert restored.state == "TERMINATED"
    assert box.fs.read_text("state") == "after"

    download(client, snapshot.id)
    renamed = client.snapshots.update(snapshot.id, name="renamed", tags=["Kept"])
    assert (renamed.name, renamed.tags) == ("renamed", ("kept",))
    assert client.snapshots.update(quick.id, clear_expires_at=True).expires_at is None
    for each in (quick, snapshot):
        assert client.snapshots.delete(each.id).state in ("DELETING", "DELETED")
        with raises(tenki.SnapshotNotFoundError, each.id):
            client.snapshots.get(each.id)
    with raises(tenki.SnapshotNotFoundError):
        client.create(snapshot_id=snapshot.id)


def download(client: Client, snapshot: str) -> None:
    link = client.snapshots.download_url(snapshot)
    assert link.expires_at
    assert link.expires_at > datetime.now(UTC)
    with urllib.request.urlopen(link.url, timeout=60) as response:
        assert response.headers["content-disposition"] == f'attachment; filename="{snapshot}.sbx"'
        Path(sys.argv[1], "downloaded.sbx").write_bytes(response.read())
    with raises(urllib.error.HTTPError, "403"):
        urllib.request.urlopen(re.sub("signature=.", "signature=x", link.url), timeout=60)


def pausing(client: Client, box: Sandbox) -> None:
    pid = sh(box, "sleep 100000 >/dev/null 2>&1 </dev/null & echo $!")
    box.pause_async()
    assert box.state in ("PAUSING", "PAUSED")
    box.wait_paused(300)
    assert client.get(box.id).info.paused_at
    with raises(tenki.InvalidStateError, "session is not running: state = PAUSED"):
        box.exec("true")
    box.resume()
    assert box.state == "RUNNING"
    assert box.info.last_resume_error == ""
    sh(box, f"kill -0 {pid}")
    box.pause()
    assert box.state == "PAUSED"
    box.resume()
    sh(box, f"kill {pid}")


def volumes(client: Client, box: Sandbox) -> None:
    volume = client.volumes.create(name="cache", size_bytes=16 * MIB)
    assert client.volumes.wait_ready(volume.id).size_bytes == 16 * MIB
    assert volume.id in {each.id for each in client.volumes.list()}
    box.attach_volume(volume.id, "/workspace/cache")
    sh(box, "grep -q ' /workspace/cache ' /proc/mounts && echo kept >/workspace/cache/file")
    assert client.volumes.get(volume.id).state == "IN_USE"
    with raises(tenki.VolumeInUseError):
        client.volumes.delete(volume.id)
    box.detach_volume(volume.id)
    assert "/workspace/cache" not in sh(box, "cat /proc/mounts")
    assert client.volumes.resize(volume.id, 32 * MIB).size_bytes == 32 * MIB
    box.attach_volume(volume.id, "/again", read_only=True)
    assert sh(box, "cat /again/file; touch /again/new 2>/dev/null || echo no") == "kept\nno"
    box.detach_volume(volume.id)
    renamed = client.volumes.update(volume.id, name="renamed", tags=["a"])
    assert (renamed.name, renamed.tags) == ("renamed", ("a",))
    client.volumes.delete(volume.id)
    with raises(tenki.VolumeNotFoundError, volume.id):
        client.volumes.get(volume.id)


def page_of(url: str) -> str:
    """What a browser gets, for which every name below localhost is this host."""
    parts = urlsplit(url)
    here = f"http://127.0.0.1:{parts.port}/"
    asked = urllib.request.Request(here, headers={"Host": parts.netloc})
    with urllib.request.urlopen(asked, timeout=60) as response:
        body: bytes = response.read()
    return body.decode()


def ports(client: Client, box: Sandbox) -> None:
    sh(box, "mkdir -p www && echo page >www/index.html && busybox httpd -p 127.0.0.1:3000 -h www")
    exposed = box.expose_port(3000, ttl=3600)
    assert exposed.port == 3000
    assert exposed.expires_at
    assert page_of(exposed.url) == "page\n"
    assert [each.url for each in box.list_exposed_ports()] == [exposed.url]
    preview = client.preview_urls.create("demo", session_id=box.id, port=3000)
    assert page_of(preview.url) == "page\n"
    assert preview.url != exposed.url
    assert {each.slug for each in client.preview_urls.list(session_id=box.id)} == {
        "demo", exposed.slug,
    }  # fmt: skip
    box.unexpose_port(3000)
    assert client.preview_urls.get(preview.id).session_id is None
    for url in (exposed.url, preview.url):
        with raises(urllib.error.HTTPError, "404"):
            page_of(url)
    bound = client.preview_urls.bind(preview.id, box.id, 3000)
    assert (bound.url, bound.port) == (preview.url, 3000)
    assert page_of(bound.url) == "page\n"
    assert client.preview_urls.unbind(preview.id).session_id is None
    client.preview_urls.delete(preview.id)
    assert preview.id not in {each.id for each in client.preview_urls.list()}


def connections(box: Sandbox) -> None:
    sh(box, "busybox nc -lk -s 127.0.0.1 -p 97 -e cat >/dev/null 2>&1 </dev/null & true")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"from the host: " + connection.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        tunnel = box.expose_host_port(f"127.0.0.1:{server.getsockname()[1]}")
        said = sh(box, f"echo hi | busybox nc 127.0.0.1 {tunnel.sandbox_port}")
        assert said == "from the host: hi"
        tunnel.close()
        thread.join(60)
    box.update_ssh_authorized_keys(
        ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPZhBLjVkM4yM5bWkB5rXuCyGPLRzXSzJcSuOEq0dNkI test"]
    )
    with raises(tenki.GitOperationFailedError):
        box.git.clone("/there/is/none")


def errors(client: Client, box: Sandbox) -> None:
    nobody = str(uuid.uuid4())
    with raises(tenki.SessionNotFoundError):
        client.get(nobody)
    with raises(tenki.SnapshotNotFoundError, nobody):
        client.snapshots.get(nobody)
    with raises(tenki.VolumeNotFoundError, nobody):
        client.volumes.get(nobody)
    with raises(tenki.VolumeNotFoundError, nobody):
        box.attach_volume(nobody, "/x")
    with raises(tenki.UnauthorizedError):
        Client(api_key="tk_nobody-has-this").who_am_i()
    with raises(tenki.InvalidAuthTokenError):
        Client(api_key="not-a-key")
    with raises(tenki.SandboxError, "does not serve"):
        client.templates.list()


def ends(client: Client, box: Sandbox) -> None:
    box.terminate()
    assert box.state == "TERMINATED"
    assert box.id not in {each.id for each in client.list()}
    assert box.id in {each.id for each in client.list(include_terminated=True)}
    with raises(tenki.SessionTerminatedError):
        box.exec("true")


def main() -> None:
    with Client() as client:
        box = client.create(
            name="life",
            cpu_cores=1,
            memory_mb=256,
            max_duration=3600,
            env={"GREETING": "hello"},
            metadata={"purpose": "test"},
            tags=["ci", "PY"],
        )
        parts = {
            "records": lambda: records(client, box),
            "commands": lambda: commands(box),
            "files": lambda: files(box),
            "snapshots": lambda: snapshots(client, box),
            "pausing": lambda: pausing(client, box),
            "volumes": lambda: volumes(client, box),
            "ports": lambda: ports(client, box),
            "connections": lambda: connections(box),
            "errors": lambda: errors(client, box),
            "ends": lambda: ends(client, box),
        }
        for name in sys.argv[2:] or parts:
            parts[name]()
            print(name, flush=True)


if __name__ == "__main__":
    main()
