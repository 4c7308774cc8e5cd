"""Tenki's data plane over the wire: frames that no SDK shows, and what clients may do wrong."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from stratabox.client import Client
from stratabox.tenki.v1 import data_plane_pb2 as pb
from stratabox.tenki.v1 import records_pb2, sandbox_pb2
from support.data_plane import DataPlane, Stream, heard, refusal
from support.guest_git import put_git
from support.rig import eventually
from support.tenki import Refused, Tenki

Session = records_pb2.SandboxSession
KEY = "AAAAC3NzaC1lZDI1NTE5AAAAIO1t3yDLPdmgrbubemtuhc+7LDb5FjCZRs15l3zx6j2y"


@pytest.fixture(scope="module")
def plane(tenki: Tenki, session: Session) -> DataPlane:
    return DataPlane(tenki, session.id)


# Commands


def test_a_command_runs_as_tenki_at_home(plane: DataPlane) -> None:
    ran = plane.run("sh", "-c", "id -un; pwd; echo $HOME; echo warned >&2; exit 3")
    assert (ran.stdout, ran.stderr) == (b"tenki\n/home/tenki\n/home/tenki\n", b"warned\n")
    assert ran.kinds[0] == "started"
    assert ran.pid > 1
    assert (ran.exit.exit_code, ran.exit.reason, ran.exit.signal) == (3, "exit", "")
    assert not ran.exit.timed_out
    assert ran.exit.disk_total_bytes > ran.exit.disk_free_bytes >= ran.exit.disk_available_bytes
    assert 0 < ran.exit.disk_min_available_bytes <= ran.exit.disk_available_bytes
    assert plane.sh("id -un; pwd", privileged=True) == "root\n/home/tenki"


def test_a_session_has_an_environment_and_an_end_of_its_own(tenki: Tenki, plane: DataPlane) -> None:
    with Client(tenki.process.address) as client:
        before = client.sandboxes.get(plane.session).snapshot(level="memory")
        copy = client.snapshots.restore(before.id, env={"COLOUR": "red", "SHAPE": "round"})
        client.snapshots.delete(before.id)
        other = DataPlane(tenki, copy.id)
        assert other.sh("echo $COLOUR $SHAPE", env={"COLOUR": "blue"}) == "blue round"
        # One session's credential opens no other.
        crossing = other.started("true", session_id=plane.session)
        assert refusal(lambda: list(crossing)).code is grpc.StatusCode.UNAUTHENTICATED
        sleeping = other.started("sleep", "88888")
        assert sleeping.next().started.pid
        copy.terminate()
        assert heard(sleeping).exit.reason == "session_terminated:terminated"
        assert refusal(lambda: list(other.started("true"))) == Refused(
            grpc.StatusCode.FAILED_PRECONDITION, "session is terminated"
        )


def test_a_relative_folder_is_below_home_and_a_missing_one_is_told(plane: DataPlane) -> None:
    plane.sh("mkdir -p deep/er")
    assert plane.sh("pwd", cwd="deep/er") == "/home/tenki/deep/er"
    assert plane.sh("pwd", cwd="/usr/bin") == "/usr/bin"
    lost = plane.run("pwd", cwd="no/such")
    assert (lost.exit.exit_code, lost.exit.errno) == (126, 2)
    assert lost.exit.reason.startswith("start_failed: ")
    missing = plane.run("no-such-program")
    assert (missing.exit.exit_code, missing.exit.errno) == (127, 2)
    assert b"no-such-program" in missing.stderr
    assert missing.pid == 0


def test_input_is_granted_as_it_is_taken(plane: DataPlane) -> None:
    data = bytes(range(256)) * 4096 * 3
    ran = plane.run("sh", "-c", "cat | md5sum; sleep 0.2", stdin=data)
    assert ran.stdout.split()[0] == hashlib.md5(data).hexdigest().encode()
    assert ran.granted == len(data)


def test_signals_reach_a_command_and_are_named(plane: DataPlane) -> None:
    stream = plane.started("sh", "-c", "trap 'echo got' USR1; echo on; while :; do sleep 0.1; done")
    assert stream.next().WhichOneof("payload") == "started"
    assert stream.printed() == b"on\n"
    stream.send(pb.RunRequest(signal=pb.RunSignal(signal=pb.RunSignal.SIG_USR1)))
    assert stream.printed() == b"got\n"
    stream.send(pb.RunRequest(signal=pb.RunSignal(signal=pb.RunSignal.SIG_UNSPECIFIED)))
    stream.send(pb.RunRequest(signal=pb.RunSignal(signal=pb.RunSignal.SIG_KILL)))
    ended = heard(stream).exit
    assert (ended.exit_code, ended.signal, ended.reason) == (137, "killed", "signaled")
    told = plane.started("sleep", "88888")
    told.next()
    told.send(pb.RunRequest(signal=pb.RunSignal(signal=pb.RunSignal.SIG_TERM)))
    assert heard(told).exit.signal == "terminated"
    wrong = plane.started("sleep", "88888")
    wrong.next()
    wrong.send(pb.RunRequest(start=pb.RunStart()))
    assert refusal(lambda: list(wrong)).code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_command_whose_time_is_over_is_told_first(plane: DataPlane) -> None:
    line = "trap 'echo asked; exit 7' TERM; echo on; while :; do sleep 0.1; done"
    asked = plane.run("sh", "-c", line, timeout_ms=3000)
    assert asked.stdout == b"on\nasked\n"
    assert (asked.exit.timed_out, asked.exit.reason) == (True, "timeout")
    plain = plane.run("sleep", "88888", timeout_ms=100)
    assert (plain.exit.timed_out, plain.exit.signal) == (True, "terminated")


def test_a_command_whose_caller_is_gone_is_told_and_then_killed(plane: DataPlane) -> None:
    line = "trap 'echo told >told' TERM; echo $$ >deaf; while :; do sleep 88888 & wait; done"
    stream = plane.started("sh", "-c", line)
    stream.next()
    eventually(lambda: plane.file("Stat", path="deaf").size > 0)
    stream.cancel()
    eventually(lambda: plane.file("Stat", path="told").size > 0)
    pid = plane.file("ReadFile", path="deaf").content.decode().strip()
    eventually(lambda: not plane.file("Stat", path=f"/proc/{pid}").exists)
    eventually(lambda: not sleeps(plane))


def test_a_command_has_a_terminal_if_it_is_asked_for(plane: DataPlane) -> None:
    ran = plane.run("sh", "-c", "tty >/tmp/tty; cat", stdin=b"typed\n", pty=True)
    assert ran.exit.exit_code == 0
    assert ran.stdout == b"typed\r\ntyped\r\n", "what is typed is shown, and what cat says"
    assert plane.file("ReadFile", path="/tmp/tty").content.startswith(b"/dev/pts/")


def test_a_stream_that_begins_otherwise_is_refused(plane: DataPlane) -> None:
    for method, frame in (
        ("Run", pb.RunRequest(stdin=b"x")),
        ("Dial", pb.DialRequest(data=b"x")),
        ("HostPortTunnel", pb.HostPortTunnelRequest()),
    ):
        stream = plane.stream(method)
        stream.send(frame)
        assert refusal(lambda: list(stream)).code is grpc.StatusCode.INVALID_ARGUMENT  # noqa: B023
    assert refusal(lambda: list(plane.started())).code is grpc.StatusCode.INVALID_ARGUMENT


# Files


def test_files_are_written_and_read_by_relative_paths(plane: DataPlane) -> None:
    content = bytes(range(256)) * 1000
    written = plane.file("WriteFile", path="notes", content=content)
    assert (written.path, written.size_bytes) == ("/home/tenki/notes", len(content))
    assert plane.file("ReadFile", path="notes").content == content
    assert plane.sh("stat -c '%U:%G %a' notes") == "tenki:tenki 644"
    told = plane.file("Stat", path="notes")
    assert (told.exists, told.is_dir, told.mode, told.size) == (True, False, 0o644, len(content))
    assert told.modified_unix_ns > 10**18
    # What has a mode keeps it, and its owner.
    plane.sh("chmod 755 notes; chown root notes", privileged=True)
    plane.file("WriteFile", path="/home/tenki/notes", content=b"")
    assert plane.sh("stat -c '%U %a %s' notes") == "root 755 0"
    frames = plane.read_stream("notes")
    assert [(each.data, each.eof) for each in frames] == [(b"", True)]


def test_a_large_file_goes_in_one_message_and_comes_in_pieces(plane: DataPlane) -> None:
    content = b"0123456789abcdef" * (5 << 16)  # 5 MiB: more than gRPC takes by itself
    plane.file("WriteFile", path="/tmp/large", content=content)
    frames = plane.read_stream("/tmp/large", chunk_bytes=3 << 20)
    assert b"".join(each.data for each in frames) == content
    assert max(len(each.data) for each in frames) == 2 << 20
    assert {each.total_size for each in frames} == {len(content)}
    assert [each.eof for each in frames[:-1]] == [False] * (len(frames) - 1)
    assert frames[-1].eof
    part = plane.read_stream("/tmp/large", offset=5, length=7, chunk_bytes=4)
    assert [each.data for each in part] == [b"5678", b"9ab"]
    plane.file("Remove", path="/tmp/large")


def test_a_stream_is_written_whole_or_in_place(plane: DataPlane) -> None:
    pieces = iter([b"first ", b"second"])
    done = plane.write_stream(pieces, path="made", mode=0o600, truncate=True, sync=True).result()
    assert (done.response.bytes_written, done.response.path) == (12, "/home/tenki/made")
    assert plane.sh("cat made; stat -c ' %U %a' made") == "first second tenki 600"
    plane.write_stream(iter([b"FIRST"]), path="made", mode=0o644, truncate=False).result()
    assert plane.sh("cat made; stat -c ' %a' made") == "FIRST second 600"


def test_nothing_comes_of_a_stream_that_is_broken_off(plane: DataPlane) -> None:
    plane.file("WriteFile", path="kept", content=b"before")
    for _ in range(2):
        more = threading.Event()

        def pieces(more: threading.Event = more) -> Iterator[bytes]:
            yield b"x" * (1 << 20)
            more.wait(60)

        call = plane.write_stream(pieces(), path="kept", truncate=True)
        eventually(lambda: len(aside(plane)) == 1)
        call.cancel()
        more.set()
        eventually(lambda: not aside(plane))
    assert plane.file("ReadFile", path="kept").content == b"before"


def aside(plane: DataPlane) -> list[str]:
    """Files at home that are not yet what they are to be."""
    entries = plane.file("List", path="", include_hidden=True).entries
    return [each.name for each in entries if each.name.startswith(".stratabox")]


def test_directories_are_made_listed_and_removed(plane: DataPlane) -> None:
    plane.file("Mkdir", path="tree/a/b", mode=0o750, recursive=True)
    assert plane.sh("stat -c '%U %a' tree tree/a/b") == "tenki 755\ntenki 750"
    plane.file("WriteFile", path="tree/file", content=b"12345")
    plane.file("WriteFile", path="tree/.hidden", content=b"")
    plane.sh("ln -s a tree/link; ln -s nowhere tree/dangling")
    names = [each.name for each in plane.file("List", path="tree").entries]
    assert names == ["a", "dangling", "file", "link"]
    every = plane.file("List", path="tree", include_hidden=True).entries
    assert [each.name for each in every] == [".hidden", *names]
    (file,) = [each for each in every if each.name == "file"]
    assert (file.is_dir, file.size, file.mode) == (False, 5, 0o644)
    link = plane.file("Stat", path="tree/link")
    assert (link.is_symlink, link.symlink_target, link.is_dir) == (True, "a", True)
    dangling = plane.file("Stat", path="tree/dangling")
    assert (dangling.exists, dangling.is_symlink) == (True, True)
    full = refusal(lambda: plane.file("Remove", path="tree"))
    assert full == Refused(
        grpc.StatusCode.FAILED_PRECONDITION, "remove /home/tenki/tree: directory not empty"
    )
    gone = plane.file("Remove", path="tree", recursive=True)
    assert (gone.removed, gone.entries_removed) == (True, 7)
    assert not plane.file("Stat", path="tree").exists


@pytest.mark.parametrize(
    ("method", "verb", "fields"),
    [
        ("ReadFile", "open", {}),
        ("List", "open", {}),
        ("Remove", "remove", {"recursive": True}),
        ("WriteFile", "open", {"content": b"x"}),
    ],
)
def test_what_is_not_there_is_said_in_words_that_clients_know(
    plane: DataPlane, method: str, verb: str, fields: dict[str, Any]
) -> None:
    words = "no such file or directory"
    assert refusal(lambda: plane.file(method, path="no/such", **fields)) == Refused(
        grpc.StatusCode.NOT_FOUND, f"{verb} /home/tenki/no/such: {words}"
    )
    # Of a name that clients would take for another kind of trouble there is nothing in the text.
    misleading = refusal(lambda: plane.file(method, path="a snapshot/template", **fields))
    assert misleading == Refused(grpc.StatusCode.NOT_FOUND, words)


def test_paths_that_cannot_be_are_refused(plane: DataPlane) -> None:
    for method, path in (("ReadFile", ""), ("Remove", "/"), ("WriteFile", "x" * 5000)):
        answer = refusal(lambda: plane.file(method, path=path))  # noqa: B023
        assert answer.code is grpc.StatusCode.INVALID_ARGUMENT, (method, path[:9])
    assert [each.name for each in plane.file("List", path="").entries]
    negative = refusal(lambda: plane.read_stream("notes", offset=-1))
    assert negative.code is grpc.StatusCode.INVALID_ARGUMENT


# Connections


def test_a_socket_of_the_guest_is_dialed(tenki: Tenki, plane: DataPlane) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Client(tenki.process.address) as client,
    ):
        server.settimeout(60)
        # What listens in the guest is its own sshd, which leads to this host.
        box = client.sandboxes.get(plane.session)
        port = box.ports.add("/tmp/answers.sock", server.getsockname()[1], direction="to_host")
        stream = plane.stream("Dial")
        stream.send(dial(plane, "/tmp/answers.sock"))
        assert stream.next().opened.sandbox_address == "/tmp/answers.sock"
        near, _ = server.accept()
        with near:
            stream.send(pb.DialRequest(data=b"ping"))
            assert near.recv(4, socket.MSG_WAITALL) == b"ping"
            near.sendall(b"pong")
            assert stream.next().data == b"pong"
            stream.send(pb.DialRequest(half_close=True))
            assert near.recv(1) == b""
            near.sendall(b"still there")
        rest = list(stream)
        assert b"".join(frame.data for frame in rest) == b"still there"
        assert rest[-1].closed.reason == pb.DialClosed.REASON_CLEAN
        box.ports.remove(port.id)
    for path, reason in (
        ("no.sock", pb.DialClosed.REASON_REFUSED),
        ("", pb.DialClosed.REASON_PATH_DENIED),
        ("x" * 200, pb.DialClosed.REASON_PATH_DENIED),
    ):
        stream = plane.stream("Dial")
        stream.send(dial(plane, path))
        (closed,) = list(stream)
        assert (closed.closed.reason, bool(closed.closed.detail)) == (reason, True)


def dial(plane: DataPlane, path: str) -> pb.DialRequest:
    return pb.DialRequest(open=pb.DialOpen(session_id=plane.session, unix_socket_path=path))


def test_a_port_of_the_guest_leads_to_whoever_tunnels(plane: DataPlane) -> None:
    tunnel = plane.stream("HostPortTunnel")
    tunnel.send(opening(plane))
    opened = tunnel.next().opened
    assert (opened.sandbox_address, opened.sandbox_port > 0) == ("127.0.0.1", True)
    port = opened.sandbox_port
    taken = plane.stream("HostPortTunnel")
    taken.send(opening(plane, sandbox_port=port))
    (ended,) = list(taken)
    assert ended.terminated.reason == pb.HostPortTunnelTerminated.REASON_BIND_FAILED
    # Two connections of the guest at once, told apart by their numbers.
    guests = [plane.started("busybox", "nc", "127.0.0.1", str(port)) for _ in range(2)]
    accepted = [frame.accept for frame in frames_of(tunnel, "accept", 2)]
    assert len({each.sub_stream_id for each in accepted}) == 2
    assert all(each.source_address.startswith("127.0.0.1:") for each in accepted)
    for guest, word in zip(guests, (b"one", b"two"), strict=True):
        assert guest.next().WhichOneof("payload") == "started"
        guest.send(pb.RunRequest(stdin=word))
    said = {frame.data.payload: frame.data.sub_stream_id for frame in frames_of(tunnel, "data", 2)}
    assert set(said) == {b"one", b"two"}
    big = b"x" * (3 << 20)
    for word, number in said.items():
        for piece in (word, b" back ", big):
            data = pb.HostPortTunnelData(sub_stream_id=number, payload=piece)
            tunnel.send(pb.HostPortTunnelRequest(data=data))
        close = pb.HostPortTunnelClose(sub_stream_id=number)
        tunnel.send(pb.HostPortTunnelRequest(close=close))
    for guest, word in zip(guests, (b"one", b"two"), strict=True):
        assert heard(guest, started=True).stdout == word + b" back " + big
    tunnel.send(pb.HostPortTunnelRequest(close=pb.HostPortTunnelClose(sub_stream_id=0)))
    rest = [frame.WhichOneof("payload") for frame in tunnel]
    assert set(rest) <= {"half_close", "close", "ping"}
    # Nobody listens there any more.
    assert plane.run("busybox", "nc", "127.0.0.1", str(port)).exit.exit_code != 0


def test_a_tunnel_is_only_made_where_the_guest_can_listen(plane: DataPlane) -> None:
    for wish in ({"sandbox_bind_address": "0.0.0.0"}, {"sandbox_port": 70000}):
        tunnel = plane.stream("HostPortTunnel")
        tunnel.send(opening(plane, **wish))
        (ended,) = list(tunnel)
        assert ended.terminated.reason == pb.HostPortTunnelTerminated.REASON_BIND_FAILED
        assert ended.terminated.detail
    wrong = plane.stream("HostPortTunnel")
    wrong.send(opening(plane))
    wrong.next()
    wrong.send(opening(plane))
    assert refusal(lambda: list(wrong)).code is grpc.StatusCode.INVALID_ARGUMENT


def opening(plane: DataPlane, **fields: Any) -> pb.HostPortTunnelRequest:
    wanted = pb.HostPortTunnelOpen(session_id=plane.session, **fields)
    return pb.HostPortTunnelRequest(open=wanted)


def frames_of(stream: Stream, kind: str, count: int) -> list[Any]:
    """So many frames of one kind, which are the next ones but for pings."""
    found: list[Any] = []
    while len(found) < count:
        frame = stream.next()
        if frame.WhichOneof("payload") != "ping":
            assert frame.WhichOneof("payload") == kind, frame
            found.append(frame)
    return found


# What the control plane does in a session


def test_keys_are_put_where_an_sshd_in_the_guest_looks(tenki: Tenki, plane: DataPlane) -> None:
    keys = [f"ssh-ed25519 {KEY} somebody@example.org"]
    request = sandbox_pb2.UpdateSSHAuthorizedKeysRequest(
        session_id=plane.session, ssh_authorized_keys=keys
    )
    tenki.call("UpdateSSHAuthorizedKeys", request)
    assert plane.sh("stat -c '%U %a' .ssh .ssh/authorized_keys") == "tenki 700\ntenki 600"
    assert KEY in plane.sh("cat .ssh/authorized_keys")
    for wrong in ([], ["no key"]):
        request = sandbox_pb2.UpdateSSHAuthorizedKeysRequest(
            session_id=plane.session, ssh_authorized_keys=wrong
        )
        answer = refusal(lambda: tenki.call("UpdateSSHAuthorizedKeys", request))  # noqa: B023
        assert answer.code is grpc.StatusCode.INVALID_ARGUMENT


def test_git_is_the_guests_own(tenki: Tenki, plane: DataPlane) -> None:
    def git(operation: str, **args: str) -> str:
        request = sandbox_pb2.GitOperationRequest(
            session_id=plane.session, operation=operation, args=args
        )
        answer: sandbox_pb2.GitOperationResponse = tenki.call("GitOperation", request)
        return answer.output

    none = refusal(lambda: git("clone", repo="/tmp/origin"))
    assert none.code is grpc.StatusCode.FAILED_PRECONDITION
    assert none.text.startswith("git clone failed (exit_code=127); ")
    put_git(plane)
    plane.sh(
        "git init -q -b main /tmp/origin && cd /tmp/origin && echo one >file && git add file"
        " && git -c user.name=T -c user.email=t@example.org commit -qm first"
    )
    assert "Cloning into '/home/tenki/origin'" in git("clone", repo="/tmp/origin")
    plane.file("WriteFile", path="origin/file", content=b"two\n")
    # What names no directory is done where was cloned last.
    assert "-one\n+two" in git("diff", base="HEAD", path="file")
    assert "Switched to a new branch 'work'" in git("checkout", ref="work", create="true")
    assert "first" in git("log", max_count="1", directory="origin")
    failed = refusal(lambda: git("checkout", ref="file"))
    assert failed.text.startswith("git checkout failed (exit_code=")
    missing = refusal(lambda: git("clone", repo="/tmp/nowhere"))
    assert missing.code is grpc.StatusCode.FAILED_PRECONDITION
    assert missing.text.startswith("git clone failed (exit_code=128); ")
    assert "does not exist" in missing.text
    assert refusal(lambda: git("push")).code is grpc.StatusCode.INVALID_ARGUMENT


def test_nothing_is_left_of_calls_that_are_broken_off(tenki: Tenki, plane: DataPlane) -> None:
    plane.sh("true")
    before = held(tenki)  # with what may be left for a moment of calls that have just ended
    for wait in (True, False):
        streams = [plane.started("sleep", "88888") for _ in range(3)]
        for request, method in (
            (opening(plane), "HostPortTunnel"),
            (dial(plane, "/run/dbus/none.sock"), "Dial"),
        ):
            stream = plane.stream(method)
            stream.send(request)
            streams.append(stream)
        if wait:
            for stream in streams:
                assert stream.next()
            assert held(tenki) - before
        for stream in streams:
            stream.cancel()
    eventually(lambda: not sleeps(plane))
    eventually(lambda: not held(tenki) - before, what=f"{before} {held(tenki)}")


def sleeps(plane: DataPlane) -> bool:
    """Whether the guest still has a command that was told to sleep long."""
    every = "for p in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$p; echo; done 2>/dev/null"
    return b"sleep 88888 " in plane.run("sh", "-c", every).stdout


def held(tenki: Tenki) -> Counter[str]:
    """Names of the tasks that the daemon has for calls and what they carry."""
    log = tenki.process.log
    told = log.read_text().count(" tasks: ")
    os.kill(tenki.process.pid, signal.SIGUSR1)
    eventually(lambda: log.read_text().count(" tasks: ") > told)
    words = log.read_text().rpartition(" tasks: ")[2].splitlines()[0]
    ours = ("exec", "tenki", "dial", "handle", "Task-")
    return Counter(name.rstrip("0123456789") for name in words.split(", ") if name.startswith(ours))


def test_a_real_distribution_gets_its_user_too(tenki: Tenki) -> None:
    with Client(tenki.process.address) as client:
        client.images.build_debian()
        with client.sandboxes.create(image="debian", memory=512) as box:
            plane = DataPlane(tenki, box.id)
            plane.file("WriteFile", path=".profile", content=b"LOGGED=in\n")
            ran = plane.run("bash", "-lc", "id -un; pwd; echo $LOGGED")
            assert ran.stdout == b"tenki\n/home/tenki\nin\n"
            assert plane.sh("getent passwd tenki").endswith(":/home/tenki:/bin/bash")
            assert plane.sh("ls -A") == ".bash_logout\n.bashrc\n.profile"
