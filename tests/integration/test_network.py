"""What guests reach, and what they do not: between network namespaces of the tests' own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratabox.client import (
    Client,
    Image,
    InvalidArgumentError,
    Network,
    NetworkMode,
    NetworkUnsupportedError,
    Sandbox,
    SandboxState,
)
from stratabox.daemon.lifecycle.running.wiring import SHORT_LIFE
from support import world as w
from support.daemon import DaemonProcess, daemon
from support.images import add_tiny
from support.rig import age_of, eventually
from support.world import World, world

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root")

FORBIDDEN = [
    w.HOST, w.HOST_PUBLIC, w.NEIGHBOUR, w.METADATA, *w.PRIVATE, "10.0.2.2", "10.0.2.3",
    "192.168.77.255", "192.0.2.1", "198.18.0.1",
]  # fmt: skip
GIVE_UP = 60.0
# As in test_plain_user: what it needs lies in folders of root's, which it may read.
PLAIN = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    "--bounding-set=-all,+dac_read_search",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
    "--",
)


def helpers(process: DaemonProcess) -> dict[str, int]:
    """Sandbox id → pid of every helper of this store, seen from outside."""
    prefix, found = f"stratabox-{process.store_id()}-", {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"stratabox.daemon.hypervisor.network.helper" in words:
                name = words[words.index(b"--name") + 1].decode()
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] = int(entry.name)
    return found


def fetch(box: Sandbox, host: str, path: str = "/whoami", port: int = 80) -> str:
    """What a server says to the guest; "! " and the reason where it says nothing."""
    line = f"printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' | nc -w 10 {host} {port}"
    result = box.execute(line, timeout=30)
    body = result.stdout.decode().partition("\r\n\r\n")[2].strip()
    return body or f"! {result.stderr.decode().strip()}"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.fixture(scope="module")
def process(
    net: World, debian: Image, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    """In the host namespace. Images are built outside, where packages come from."""
    with daemon(tmp_path_factory.mktemp("networked"), wrapper=net.inside) as made:
        made.start().close()
        yield made
        with Client(made.address) as client:
            for each in client.sandboxes.list():
                each.delete()
        assert helpers(made) == {}, "helpers end with their guests"
        made.stop()


@pytest.fixture
def client(process: DaemonProcess) -> Iterator[Client]:
    """Of the daemon in its namespace, which a test may have started anew."""
    with Client(process.address) as client:
        yield client


@pytest.fixture(scope="module")
def booted(process: DaemonProcess) -> str:
    """Id of a tiny guest whose network the tests change as they like."""
    with Client(process.address) as client:
        client.images.build_tiny()
        return client.sandboxes.create(image="tiny", memory=256, network="egress").id


@pytest.fixture
def box(client: Client, booted: str, net: World) -> Sandbox:
    """The same, with everything public allowed, and nothing reached yet."""
    box = client.sandboxes.get(booted)
    box.update(network="egress")
    net.reached()
    return box


def test_everything_public_is_reached_by_name_and_by_address(box: Sandbox, net: World) -> None:
    assert box.network == Network(mode=NetworkMode.EGRESS, allow=("public",))
    assert fetch(box, w.PACKAGES) == w.PACKAGES
    assert fetch(box, "other.test", port=8080) == w.ELSEWHERE
    assert fetch(box, "www.pkg.test") == w.PACKAGES
    assert box.execute(f"ping -c 1 -W 5 {w.PACKAGES}").exit_code in (0, 1)  # a host may forbid it
    assert set(net.reached()) == {
        f"{w.PACKAGES}:80", f"{w.ELSEWHERE}:8080", "other.test", "www.pkg.test",
    }  # fmt: skip


def test_a_scan_from_inside_finds_nothing_that_is_walled_off(
    client: Client, box: Sandbox, net: World
) -> None:
    """Host, loopback, other guests' forwards, the API, metadata, private ranges: all refused."""
    scan = "; ".join(
        f"for port in 22 53 80 443 8080 50051; do nc -w 5 {address} $port </dev/null 2>&1"
        f" | sed 's/^/{address} /'; done"
        for address in FORBIDDEN
    )
    result = box.execute(scan, timeout=4 * GIVE_UP)
    told = result.stdout.decode().splitlines()
    assert len(told) == 6 * len(FORBIDDEN), "each was refused, none timed out"
    assert [line for line in told if "refused" not in line] == []
    assert net.reached() == []
    # Nor does a name lead there, and a name server elsewhere is refused.
    fetch(box, "rebind.pkg.test")
    assert set(net.reached()) <= {"rebind.pkg.test", f"{w.PACKAGES}:80"}
    lookup = box.execute(f"nslookup pkg.test {w.METADATA}", timeout=60)
    assert lookup.exit_code != 0
    assert net.reached() == []


def test_what_is_named_opens_and_nothing_else(box: Sandbox, net: World) -> None:
    box.update(network=["192.168.77.0/24:80", "10.66.0.1"])
    assert fetch(box, w.NEIGHBOUR) == w.NEIGHBOUR
    assert fetch(box, "10.66.0.1", port=8080) == "10.66.0.1"
    assert "refused" in fetch(box, w.NEIGHBOUR, port=8080)
    for address in (w.HOST, w.METADATA, w.PACKAGES, "100.64.0.1"):
        assert "refused" in fetch(box, address), address
    assert "bad address" in fetch(box, "pkg.test"), "no rule names it"
    box.update(network=[f"{w.HOST}:8080"])
    assert fetch(box, w.HOST, port=8080) == w.HOST, "the host's own, by its own address alone"
    assert "refused" in fetch(box, w.HOST)
    assert set(net.reached()) == {f"{w.NEIGHBOUR}:80", "10.66.0.1:8080", f"{w.HOST}:8080"}


def test_domains_open_what_they_stand_for(box: Sandbox, net: World) -> None:
    box.update(network=["*.pkg.test:80", "pkg.test"])
    assert fetch(box, "files.pkg.test") == w.PACKAGES
    assert fetch(box, "pkg.test", port=8080) == w.PACKAGES
    assert "bad address" in fetch(box, "other.test")
    assert "refused" in fetch(box, w.ELSEWHERE)
    reached = net.reached()
    assert set(reached) == {"files.pkg.test", "pkg.test", f"{w.PACKAGES}:80", f"{w.PACKAGES}:8080"}
    # A name that points inwards gives what is public of it, and opens nothing else.
    answer = box.execute("nslookup rebind.pkg.test", timeout=30).stdout.decode()
    assert w.PACKAGES in answer
    for inner in (w.NEIGHBOUR, "127.0.0.1", w.METADATA):
        assert inner not in answer
        assert inner == "127.0.0.1" or "refused" in fetch(box, inner)
    assert "refused" in fetch(box, w.HOST_PUBLIC)


def test_a_change_is_there_at_once(box: Sandbox, net: World) -> None:
    """Connections that are not allowed any more end on both sides; others go on."""
    line = f"printf 'GET /drip HTTP/1.0\\r\\n\\r\\n' | nc {w.PACKAGES} 80 >/tmp/drip; echo over"
    told: list[bytes] = []
    dripping = threading.Thread(
        target=lambda: told.append(box.execute(line, timeout=4 * GIVE_UP).stdout)
    )
    dripping.start()
    eventually(
        lambda: box.execute("wc -c </tmp/drip").stdout.strip() not in (b"", b"0"),
        GIVE_UP,
        what="no drip",
    )
    box.update(network=["public", "192.168.77.2"])
    before = int(box.execute("wc -c </tmp/drip").stdout)
    eventually(
        lambda: int(box.execute("wc -c </tmp/drip").stdout) > before, GIVE_UP, what="it goes on"
    )
    net.reached()
    box.update(network=[w.ELSEWHERE])
    dripping.join(GIVE_UP)
    assert told == [b"over\n"], "the guest sees its end"
    eventually(lambda: "drip-ended" in net.reached(), GIVE_UP, what="and so does the server")
    assert "refused" in fetch(box, w.PACKAGES)
    assert fetch(box, w.ELSEWHERE) == w.ELSEWHERE
    with pytest.raises(InvalidArgumentError, match="never reached"):
        box.update(network=["127.0.0.1"])
    assert box.update(network="none").network == Network(mode=NetworkMode.NONE)
    # QEMU has told the card; the guest takes it in by itself.
    eventually(
        lambda: box.execute("cat /sys/class/net/eth0/carrier").stdout == b"0\n",
        GIVE_UP,
        what="no carrier",
    )
    assert fetch(box, w.ELSEWHERE).startswith("!")
    box.update(network="egress")
    assert fetch(box, w.ELSEWHERE) == w.ELSEWHERE


def test_copies_have_their_source_s_network_at_once(
    client: Client, box: Sandbox, net: World, process: DaemonProcess
) -> None:
    box = box.update(network=[w.PACKAGES])
    shot = box.snapshot(level="memory")
    assert shot.network == box.network == Network(allow=(w.PACKAGES,))
    same = client.snapshots.restore(shot.id)
    assert same.network == box.network
    assert fetch(same, w.PACKAGES) == w.PACKAGES
    assert "refused" in fetch(same, w.ELSEWHERE)
    other = client.snapshots.restore(shot.id, network=[w.ELSEWHERE])
    assert fetch(other, w.ELSEWHERE) == w.ELSEWHERE
    assert "refused" in fetch(other, w.PACKAGES)
    (closed,) = box.clone(network="none").sandboxes
    assert closed.network.mode == NetworkMode.NONE
    assert fetch(closed, w.PACKAGES).startswith("!")
    assert set(helpers(process)) == {box.id, same.id, other.id}
    # One that was closed can be opened, a copy of it too.
    opened = client.snapshots.restore(closed.snapshot(level="memory").id, network="egress")
    assert fetch(opened, w.ELSEWHERE) == w.ELSEWHERE
    same.pause(to_disk=True)
    assert same.id not in helpers(process)
    same.resume()
    assert fetch(same, w.PACKAGES) == w.PACKAGES
    for each in (same, other, closed, opened):
        each.delete()
    assert set(helpers(process)) == {box.id}


def test_a_daemon_s_end_is_not_the_network_s(
    client: Client, box: Sandbox, net: World, process: DaemonProcess
) -> None:
    """A connection outlives a daemon that was killed; the next one rules the same helper."""
    before = helpers(process)
    line = f"printf 'GET /drip HTTP/1.0\\r\\n\\r\\n' | nc {w.PACKAGES} 80 >/tmp/lives"
    assert box.execute(f"({line}) </dev/null >/dev/null 2>&1 &").exit_code == 0
    eventually(
        lambda: box.execute("wc -c </tmp/lives").stdout.strip() not in (b"", b"0"),
        GIVE_UP,
        what="no drip",
    )
    process.kill()
    with process.start() as again:
        box = again.sandboxes.get(box.id)
        size = int(box.execute("wc -c </tmp/lives").stdout)
        eventually(
            lambda: int(box.execute("wc -c </tmp/lives").stdout) > size, GIVE_UP, what="it goes on"
        )
        assert helpers(process) == before
        box.update(network=[w.ELSEWHERE])
        eventually(
            lambda: "drip-ended" in net.reached(), GIVE_UP, what="the new daemon's word counts"
        )
        # A helper that does not answer is replaced, and nothing is open meanwhile.
        os.kill(before[box.id], signal.SIGSTOP)
    process.stop()
    with process.start() as again:
        assert helpers(process)[box.id] != before[box.id]
        assert not Path(f"/proc/{before[box.id]}/fd/0").exists()
        assert fetch(again.sandboxes.get(box.id), w.ELSEWHERE) == w.ELSEWHERE


def test_memory_of_before_there_was_a_network_goes_on_without(
    client: Client, box: Sandbox, process: DaemonProcess
) -> None:
    shot = box.snapshot(level="memory")
    process.stop()
    with contextlib.closing(sqlite3.connect(process.state / "catalog.db")) as catalog, catalog:
        catalog.execute(
            "UPDATE snapshots SET network = NULL, machine = json_remove(machine, '$.uplink')"
            " WHERE id = ?",
            (shot.id,),
        )
    with process.start() as again:
        assert again.snapshots.get(shot.id).network is None
        with pytest.raises(NetworkUnsupportedError):
            again.sandboxes.revert(box.id, shot.id)
        assert again.sandboxes.get(box.id).state == SandboxState.RUNNING
        with again.snapshots.restore(shot.id) as old:
            assert old.network == Network(mode=NetworkMode.NONE)
            assert old.id not in helpers(process)
            # QEMU's own network, which answers for its gateway and leads nowhere.
            assert old.execute("ping -c 1 -W 5 10.0.2.2").exit_code == 0
            assert fetch(old, w.PACKAGES).startswith("!")
            with pytest.raises(NetworkUnsupportedError, match="stop and start"):
                old.update(network="egress")
            assert old.refresh().network == Network(mode=NetworkMode.NONE)
            with pytest.raises(NetworkUnsupportedError, match="cold"):
                again.snapshots.restore(shot.id, network="egress")
            old.stop(force=True)
            assert old.update(network="egress").network.allow == ("public",)
        again.snapshots.delete(shot.id)


def test_a_helper_that_dies_is_replaced(box: Sandbox, process: DaemonProcess) -> None:
    old = helpers(process)[box.id]
    # One that lives too short is not.
    eventually(lambda: age_of(old) > SHORT_LIFE + 1, GIVE_UP)
    os.kill(old, signal.SIGKILL)
    eventually(lambda: helpers(process).get(box.id, old) != old, GIVE_UP, what="another one")
    eventually(lambda: fetch(box, w.PACKAGES) == w.PACKAGES, GIVE_UP, what="which works")


def test_a_helper_can_do_nothing_else(box: Sandbox, process: DaemonProcess) -> None:
    pid = helpers(process)[box.id]
    qemu = process.guests()[box.id]
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    uid = Path(f"/proc/{qemu}").stat().st_uid
    assert uid >= 65536
    assert status["Uid"].split() == [str(uid)] * 4
    assert status["Gid"].split() == [str(uid)] * 4
    assert status["Groups"].strip() == ""
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert Path(f"/proc/{pid}/mem").stat().st_uid == 0, "its uid cannot look into it"
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max processes             0                    0" in limits


def test_a_plain_user_has_the_same_walls(net: World) -> None:
    """A daemon without privileges: the helper is its own user's, and has fewer rights still."""
    wrapper = (*net.inside, *PLAIN)
    with tempfile.TemporaryDirectory(prefix="stratabox-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        asyncio.run(add_tiny(folder / "cache"))
        (folder / "cache").chmod(0o777)
        environment = {
            "STRATABOX_BUILD_CACHE": str(folder / "cache"),
            "HOME": name,
            "STRATABOX_LAUNCHER": "qemu",  # libvirt's system is root's
        }
        with daemon(folder, environment, wrapper) as made, made.start() as client:
            client.images.build_tiny()
            with client.sandboxes.create(image="tiny", memory=128, network="egress") as box:
                pid = helpers(made)[box.id]
                status = Path(f"/proc/{pid}/status").read_text()
                assert "\nUid:\t65534\t65534\t65534\t65534\n" in status
                for kind in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
                    assert f"\n{kind}:\t{0:016x}\n" in status
                assert fetch(box, w.PACKAGES) == w.PACKAGES
                net.reached()
                for address in (w.HOST, w.METADATA, "10.0.2.2"):
                    assert "refused" in fetch(box, address)
                assert net.reached() == []
            assert helpers(made) == {}
            made.stop()


def test_packages_install_in_a_real_debian(client: Client, net: World) -> None:
    """apt and pip, from servers of the test's own, by the domains that are allowed."""
    w.make_packages(net.files)
    client.images.build_debian()
    with client.sandboxes.create(
        image="debian", memory=512, network=["*.pkg.test:80", "pkg.test"]
    ) as box:

        def run(line: str) -> str:
            result = box.execute(line, timeout=240, env={"DEBIAN_FRONTEND": "noninteractive"})
            assert result.exit_code == 0, (line, result.stdout[-2000:], result.stderr[-2000:])
            return result.stdout.decode()

        run("echo 'deb [trusted=yes] http://files.pkg.test/apt ./' >/etc/apt/sources.list")
        run("rm -f /etc/apt/sources.list.d/*; apt-get --quiet --error-on=any update")
        run("apt-get --quiet --yes install strata-demo")
        assert run("strata-demo") == "installed by apt\n"
        run(
            "python3 -c 'import urllib.request as u;"
            ' open("/root/pip.zip","wb").write(u.urlopen("http://www.pkg.test/pip.zip").read())\''
        )
        run(
            "python3 /root/pip.zip/pip install --quiet --no-cache-dir --break-system-packages"
            " --disable-pip-version-check --root-user-action=ignore"
            " --index-url http://pkg.test/simple --trusted-host pkg.test strata_demo"
        )
        assert (
            run("python3 -c 'import strata_demo; print(strata_demo.WORDS)'") == "installed by pip\n"
        )
        refused = box.execute(
            "python3 -c 'import urllib.request as u; u.urlopen(\"http://other.test/\")'", timeout=60
        )
        assert b"Name or service not known" in refused.stderr
    reached = set(net.reached())
    assert f"{w.PACKAGES}:80" in reached
    assert not any(each.startswith(w.ELSEWHERE) or each == "other.test" for each in reached)


def test_the_default_is_the_configuration_s(
    net: World, process: DaemonProcess, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("configured")
    environment = {"STRATABOX_NETWORK": f"{w.PACKAGES}:80 *.pkg.test"}
    with daemon(folder, environment, wrapper=net.inside) as made, made.start() as client:
        client.images.build_tiny()
        with client.sandboxes.create(image="tiny", memory=256) as box:
            assert box.network == Network(allow=(f"{w.PACKAGES}:80", "*.pkg.test"))
            assert fetch(box, w.PACKAGES) == w.PACKAGES
            assert "refused" in fetch(box, w.PACKAGES, port=8080)
            box.stop(force=True)
            assert helpers(made) == {}
            box.start()
            assert fetch(box, w.PACKAGES) == w.PACKAGES
        assert helpers(made) == {}
        made.stop()
