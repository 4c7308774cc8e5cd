"""Connections into guests and out of them, without any network: real sockets at both ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratabox.client import (
    AgentUnavailableError,
    AsyncClient,
    Client,
    ConnectionLostError,
    ConnectionRefusedByGuestError,
    Endpoint,
    InvalidArgumentError,
    InvalidStateError,
    NoSpaceError,
    Port,
    PortDirection,
    PortInUseError,
    PortNotAllowedError,
    PortNotFoundError,
    Sandbox,
    SandboxNotFoundError,
)
from support.daemon import DaemonProcess, daemon
from support.rig import eventually

PROGRAM = Path(sys.executable).with_name("stratabox")
SERVERS = """\
mkdir -p /www && hostname >/www/name && echo "$1" >/www/index.html
busybox httpd -p 127.0.0.1:80 -h /www
for each in "98 sha256sum" "99 cat"; do
    set -- $each
    busybox nc -ll -p $1 -e $2 >/dev/null 2>&1 </dev/null &
done
true
"""
"""In the guest: http on 80, on 98 the digest of what is sent, on 99 an echo."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that may be started again, with the guests of this module."""
    with daemon(tmp_path_factory.mktemp("ports")) as process:
        with process.start() as client:
            client.images.build_tiny()
            client.sandboxes.create(name="one", image="tiny", memory=128)
        yield process


@pytest.fixture
def client(host: DaemonProcess) -> Iterator[Client]:
    if not host.runs:
        host.start().close()
    with Client(host.address) as client:
        yield client
        for port in client.ports.list():
            client.ports.remove(port.id)


@pytest.fixture
def one(client: Client) -> Sandbox:
    """A guest whose servers run."""
    box = client.sandboxes.get("one")
    serve(box, "one")
    return box


def serve(box: Sandbox, word: str) -> None:
    if box.execute("test -e /www/name && pidof httpd").exit_code:
        box.execute(["sh", "-c", SERVERS, "sh", word]).check()


def curl(*words: str) -> str:
    done = subprocess.run(
        [
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "60",
            "--noproxy",
            "*",
            *words,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout


def cli(host: DaemonProcess, *words: str) -> str:
    done = subprocess.run(
        [PROGRAM, *words], env=host.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    return done.stdout


@contextlib.contextmanager
def answering(bound: socket.socket, word: bytes) -> Iterator[socket.socket]:
    """A server at the host that says one word to all who come."""
    bound.listen()

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken, _ = bound.accept()
                with taken:
                    taken.sendall(word)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield bound
    finally:
        bound.shutdown(socket.SHUT_RDWR)
        thread.join()
        bound.close()


@contextlib.contextmanager
def answering_port(word: bytes) -> Iterator[int]:
    bound = socket.create_server(("127.0.0.1", 0))
    with answering(bound, word):
        yield bound.getsockname()[1]


def connects(port: Port) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port.host.port or 0)):
        return True
    return False


def heard_in_guest(box: Sandbox, port: int) -> bytes:
    return box.execute(f"busybox nc 127.0.0.1 {port} </dev/null").stdout


def test_http_in_a_guest_opens_with_curl(host: DaemonProcess, client: Client, one: Sandbox) -> None:
    made = json.loads(cli(host, "sandbox", "port", "add", "one", "80", "--json"))
    assert (made["direction"], made["listening"], made["problem"]) == ("to_guest", True, None)
    assert made["host"]["address"] == "127.0.0.1"
    assert curl(f"http://{made['listens']}/") == "one\n"
    table = cli(host, "sandbox", "port", "list", "one").splitlines()
    assert table[0].split() == [
        "ID", "SANDBOX", "DIRECTION", "LISTENS", "LEADS", "TO", "STATE", "OPEN",
    ]  # fmt: skip
    assert made["id"] in table[1]
    assert [each.id for each in one.ports.list()] == [made["id"]]
    cli(host, "sandbox", "port", "remove", made["id"])
    assert client.ports.list() == []
    with pytest.raises(PortNotFoundError):
        client.ports.remove(made["id"])


def test_bytes_go_both_ways_and_ends_are_told(client: Client, one: Sandbox) -> None:
    noise = os.urandom(1 << 20)
    with one.dial(99) as echo:

        def send() -> None:
            echo.write(noise)
            echo.write_eof()

        sender = threading.Thread(target=send)
        sender.start()
        assert b"".join(echo) == noise
        sender.join()
    # What comes after the end of what was sent: the digest is only known then.
    port = one.ports.add(98)
    with socket.create_connection(("127.0.0.1", port.host.port or 0)) as connection:
        connection.sendall(noise)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    expected = subprocess.run(["sha256sum"], input=noise, capture_output=True, check=True).stdout
    assert answer == expected


async def test_dialing_with_asyncio(host: DaemonProcess, one: Sandbox) -> None:
    async with AsyncClient(host.address) as client:
        box = await client.sandboxes.get(one.id)
        async with await box.dial("127.0.0.1:98") as connection:
            await connection.write(b"abc")
            await connection.write_eof()
            answer = b"".join([piece async for piece in connection])
            await connection.wait_closed()
        assert answer.startswith(
            b"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        )
        port = await box.ports.add(80)
        assert [each.id for each in await box.ports.list()] == [port.id]
        await box.ports.remove(port.id)
        with pytest.raises(ConnectionRefusedByGuestError):
            await box.dial(1)


def test_a_unix_socket_at_the_host(client: Client, one: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "guest.sock"
    port = one.ports.add(80, str(path), mode=0o660)
    assert stat.filemode(path.stat().st_mode) == "srw-rw----"
    assert curl("--unix-socket", str(path), "http://guest/") == "one\n"
    client.ports.remove(port.id)
    assert not path.exists()


def test_a_guest_reaches_the_host(client: Client, one: Sandbox, tmp_path: Path) -> None:
    with answering_port(b"from the host") as port:
        made = one.ports.add(5000, port, direction=PortDirection.TO_HOST)
        assert made.listening
        assert heard_in_guest(one, 5000) == b"from the host"
        client.ports.remove(made.id)
        assert heard_in_guest(one, 5000) == b""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "host.sock"))
    with answering(server, b"from a socket"):
        # A Unix socket in the guest, which is dialed through the guest's channel.
        made = one.ports.add(
            "/run/to-host.sock", str(tmp_path / "host.sock"), direction="to_host", mode=0o600
        )
        assert one.execute("stat -c %a /run/to-host.sock").stdout == b"600\n"
        with one.dial("/run/to-host.sock") as connection:
            assert b"".join(connection) == b"from a socket"
        with pytest.raises(PortInUseError):
            one.ports.add("/run/to-host.sock", port, direction="to_host")
        client.ports.remove(made.id)
        assert one.execute("test -e /run/to-host.sock").exit_code == 1


def test_what_cannot_be_forwarded(client: Client, one: Sandbox, tmp_path: Path) -> None:
    first = one.ports.add(80)
    with pytest.raises(PortInUseError, match=str(first.host.port)):
        one.ports.add(99, first.host.port or 0)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PortInUseError):
        one.ports.add(80, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    for address in ("0.0.0.0:8080", "192.0.2.1:8080", "[::]:8080", "[::ffff:192.0.2.1]:8080"):
        with pytest.raises(PortNotAllowedError, match=r"ports\.addresses"):
            one.ports.add(80, address)
    with pytest.raises(PortNotAllowedError):
        one.ports.add(5001, "192.0.2.1:80", direction="to_host")
    bad = Endpoint(path="relative.sock"), Endpoint(path="/" + "x" * 108), Endpoint(port=70000)
    for endpoint in (*bad, Endpoint(path="/x", port=1), Endpoint(address="example.org", port=80)):
        with pytest.raises(InvalidArgumentError):
            one.ports.add(endpoint)
    with pytest.raises(InvalidArgumentError):
        one.ports.add(0)
    with pytest.raises(SandboxNotFoundError):
        client.ports.add("nobody", 80)
    with pytest.raises(ConnectionRefusedByGuestError, match="12345"):
        one.dial(12345)
    with pytest.raises(ConnectionRefusedByGuestError, match=r"/run/none\.sock"):
        one.dial("/run/none.sock")
    for _ in range(63):
        one.ports.add(80)
    with pytest.raises(NoSpaceError, match="64 ports"):
        one.ports.add(80)


def test_removal_closes_connections(client: Client, one: Sandbox) -> None:
    port = one.ports.add(99)
    with socket.create_connection(("127.0.0.1", port.host.port or 0)) as connection:
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
        assert client.ports.list()[0].connections == 1
        client.ports.remove(port.id)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert not connects(port)


def test_a_reader_that_is_slow_holds_up_the_guest(host: DaemonProcess, one: Sandbox) -> None:
    size = 16 << 20
    one.execute(
        f"busybox nc -l -p 97 -e head -c {size} /dev/zero >/dev/null 2>&1 </dev/null & true"
    ).check()
    eventually(lambda: one.execute("netstat -ltn | grep -q :97").exit_code == 0)

    def written() -> int:
        line = "cat /proc/$(pidof head)/io | sed -n 's/^wchar: //p'"
        return int(one.execute(line).stdout or b"-1")

    with one.dial(97) as connection:
        seen = [-1]

        def stands_still() -> bool:
            seen.append(written())
            return seen[-1] == seen[-2] > 0

        eventually(stands_still)
        assert seen[-1] < size // 2
        assert sum(map(len, connection)) == size


def test_two_sandboxes_at_once_and_the_end_of_one(
    host: DaemonProcess, client: Client, one: Sandbox, tmp_path: Path
) -> None:
    shot = one.snapshot(name="with servers", level="memory")
    with client.snapshots.restore(shot.id, identity="keep") as two:
        assert two.ports.list() == []  # copies have none
        two.execute("echo two >/www/index.html").check()
        path = tmp_path / "two.sock"
        ports = one.ports.add(80), two.ports.add(80), two.ports.add(80, str(path))
        assert curl(f"http://{ports[0].host}/") == "one\n"
        assert curl(f"http://{ports[1].host}/") == "two\n"
        with answering_port(b"both") as port:
            for box in (one, two):
                box.ports.add(5002, port, direction="to_host")
                assert heard_in_guest(box, 5002) == b"both"
        with two.dial(99) as open_one:
            two.delete()
            with pytest.raises(ConnectionLostError):
                open_one.read()
        assert not path.exists()
        assert not connects(ports[1])
        assert {each.sandbox_id for each in client.ports.list()} == {one.id}
    client.snapshots.delete(shot.id)


def test_a_pause_a_reboot_and_the_end_of_sshd(client: Client, one: Sandbox) -> None:
    port = one.ports.add(80)
    with answering_port(b"still") as answers:
        one.ports.add(5003, answers, direction="to_host")
        one.pause()
        with pytest.raises(InvalidStateError):
            one.dial(80)
        with (
            socket.create_connection(("127.0.0.1", port.host.port or 0)) as connection,
            contextlib.suppress(ConnectionResetError),
        ):
            assert connection.recv(1) == b""
        one.resume()
        assert curl(f"http://{port.host}/") == "one\n"
        assert heard_in_guest(one, 5003) == b"still"

        one.execute("killall sshd")
        eventually(lambda: heard_in_guest(one, 5003) == b"still")
        assert all(each.listening for each in one.ports.list())

        started = one.execute("cat /proc/sys/kernel/random/boot_id").stdout
        one.execute("(sleep 0.2; reboot -f) >/dev/null 2>&1 </dev/null & true").check()

        def rebooted() -> bool:
            with contextlib.suppress(AgentUnavailableError):
                now = one.execute("cat /proc/sys/kernel/random/boot_id")
                return now.exit_code == 0 and now.stdout != started
            return False

        eventually(rebooted)
        one.wait_ready(timeout=120)
        eventually(lambda: heard_in_guest(one, 5003) == b"still")
        serve(one, "one")
        assert curl(f"http://{port.host}/") == "one\n"


def test_ports_stay_with_what_is_reverted(client: Client, one: Sandbox) -> None:
    snapshot = one.snapshot(level="memory")
    one.execute("echo later >/www/index.html").check()
    port = one.ports.add(80)
    with answering_port(b"still") as answers:
        one.ports.add(5006, answers, direction="to_host")
        assert curl(f"http://{port.host}/") == "later\n"
        back = one.revert(snapshot.id).sandbox
        assert {each.id for each in back.ports.list()} >= {port.id}
        # The guest of then knew of no port: it is told of the one that it is to listen on.
        assert curl(f"http://{port.host}/") == "one\n"
        eventually(lambda: heard_in_guest(back, 5006) == b"still")
        assert all(each.listening for each in back.ports.list())
    client.snapshots.delete(snapshot.id)


def test_ports_outlive_their_daemon(host: DaemonProcess, one: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "outlives.sock"
    port, sock = one.ports.add(80), one.ports.add(80, str(path))
    with answering_port(b"again") as answers:
        back = one.ports.add(5004, answers, direction="to_host")
        taken = one.ports.add(80)
        host.kill()
        assert path.exists()
        assert not connects(port)
        with socket.create_server(("127.0.0.1", taken.host.port or 0)), host.start() as client:
            box = client.sandboxes.get("one")
            assert curl(f"http://{port.host}/") == "one\n"
            assert curl("--unix-socket", str(path), "http://guest/") == "one\n"
            eventually(lambda: all(each.listening or each.problem for each in box.ports.list()))
            assert heard_in_guest(box, 5004) == b"again"
            found = {each.id: each for each in box.ports.list()}
            assert found.keys() == {port.id, sock.id, back.id, taken.id}
            assert "is taken at the host" in (found[taken.id].problem or "")
            assert not found[taken.id].listening
        host.stop()
        assert not path.exists()
        host.start().close()
        assert path.exists()
    with Client(host.address) as client:
        for each in client.ports.list():
            client.ports.remove(each.id)
    assert not path.exists()


def test_forwarding_at_the_client(host: DaemonProcess, one: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "here.sock"
    process = subprocess.Popen(
        [PROGRAM, "sandbox", "port", "forward", "one", "80", f"{path}:99", "--json"],
        env=host.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        text = ""
        while not text.endswith("\n}\n"):
            text += process.stdout.readline()
        listens = json.loads(text)["forwards"][0]["listens"]
        assert curl(f"http://{listens}/") == "one\n"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"ping")
            connection.shutdown(socket.SHUT_WR)
            assert connection.makefile("rb").read() == b"ping"
        assert one.ports.list() == []  # the daemon knows of none
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        process.stdout.close()
    assert not path.exists()
