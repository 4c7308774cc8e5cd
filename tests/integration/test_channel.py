"""The channel into a guest, through what ends it: restarts, restores, pauses, reboots, kills."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratabox.client import (
    AgentUnavailableError,
    Client,
    CommandFailedError,
    ConnectionLostError,
    Image,
    InvalidStateError,
    NoSshdError,
    Sandbox,
    StrataboxError,
)
from support.daemon import DaemonProcess, daemon
from support.rig import eventually

BOOT_ID = "/proc/sys/kernel/random/boot_id"
STRATABOX = Path(sys.executable).with_name("stratabox")
SERVERS = (
    "for p in /proc/[0-9]*; do read n <$p/comm; case $n in keeper*|sshd) echo ${p#/proc/};;"
    " esac; done 2>/dev/null"
)
"""Prints who serves the channel in a guest."""


class Lab:
    """A daemon that is started again, and one guest that lives through it."""

    def __init__(self, process: DaemonProcess) -> None:
        self.process = process
        self.client = process.start()
        self.client.images.build_tiny()
        self.id = self.client.sandboxes.create(image="tiny", memory=128).id

    @property
    def box(self) -> Sandbox:
        """The guest, by the daemon that runs now."""
        return self.client.sandboxes.get(self.id)

    def crash(self) -> None:
        """End the daemon as a crash would, and start another."""
        self.client.close()
        self.process.kill()
        self.client = self.process.start()

    def says(self, line: str) -> str:
        """What a line of shell prints, by the channel."""
        return said(self.box, line)


def said(box: Sandbox, line: str) -> str:
    """What a line of shell prints, by the channel."""
    with box.spawn(line) as process:
        out, err = process.communicate()
        assert process.end is not None
        assert process.end.ok, err
    return out.decode().strip()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One for all of these."""
    with daemon(tmp_path_factory.mktemp("channel")) as process:
        lab = Lab(process)
        yield lab
        for sandbox in lab.client.sandboxes.list():
            sandbox.delete()
        lab.client.close()
        process.stop()


def test_keys_are_nobody_elses_to_read(lab: Lab) -> None:
    assert lab.says("echo connected") == "connected"
    folder = lab.process.state / "channel"
    modes = {path.name: path.stat().st_mode & 0o777 for path in [folder, *folder.iterdir()]}
    assert modes == {"channel": 0o700, "client": 0o600, "host": 0o600}
    assert lab.says("stat -c %a /run/stratabox/host_key") == "600"
    listed = lab.says("for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; done 2>/dev/null")
    assert "PRIVATE KEY" not in listed


def test_sshd_that_is_killed_is_there_again(lab: Lab) -> None:
    box = lab.box
    with box.spawn("echo up; sleep 77777") as process:
        assert next(iter(process)).data == b"up\n"
        box.execute("kill -9 $(pidof sshd)")
        with pytest.raises(ConnectionLostError):
            process.wait()
    assert lab.says("echo again") == "again"
    # Nobody is left who would start the next one, and the command has ended with the last.
    box.execute(f"kill -9 $({SERVERS})")
    assert lab.says("echo $((6 * 7)); pidof sleep || :") == "42"


def test_the_agent_that_is_killed_takes_nothing_with_it(lab: Lab) -> None:
    with lab.box.spawn("echo up; read line; echo $line", stdin=True) as process:
        pieces = iter(process)
        assert next(pieces).data == b"up\n"
        lab.says("kill -9 $(pidof qemu-ga)")
        process.write(b"still here\n")
        assert next(pieces).data == b"still here\n"
    lab.box.wait_ready()


def test_a_new_daemon_finds_it_and_what_was_left_behind(lab: Lab) -> None:
    lab.says("rm -f /root/go; mkfifo /root/go")
    name = lab.box.processes.start("echo one; read x </root/go; echo two; exit 3; ")
    waiting = lab.box.processes.start("echo begun; sleep 0.2; echo over; exit 8")
    with lab.box.spawn(["sleep", "77777"]) as process:
        lab.crash()
        with pytest.raises(StrataboxError):
            process.wait()
    box = lab.box
    assert box.processes.wait(waiting).exit_code == 8
    assert {each.id for each in box.processes.list()} >= {name, waiting}
    pieces = [each.data for each in box.processes.attach(waiting) if hasattr(each, "data")]
    assert b"".join(pieces) == b"begun\nover\n"
    box.execute("echo >/root/go").check()
    assert box.processes.wait(name).exit_code == 3
    eventually(lambda: "sleep" not in box.execute("ps").stdout_text)


def test_a_copy_has_its_own_and_knows_what_it_inherited(lab: Lab) -> None:
    box = lab.box
    name = box.processes.start("i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done")
    with box.spawn("echo up; read line; echo got $line", stdin=True) as open_all_the_while:
        pieces = iter(open_all_the_while)
        assert next(pieces).data == b"up\n"
        snapshot = lab.client.snapshots.create(box.id, level="memory")
        with lab.client.snapshots.restore(snapshot.id) as copy:
            assert said(copy, "hostname") != lab.says("hostname")
            (inherited,) = [each for each in copy.processes.list() if each.id == name]
            assert inherited.inherited
            assert inherited.started_in == box.id
            assert inherited.end is None
            copy.processes.signal(name, "KILL")
            assert copy.processes.wait(name).signal == 9
        open_all_the_while.write(b"the source's\n")
        assert next(pieces).data == b"got the source's\n"
    (own,) = [each for each in box.processes.list() if each.id == name]
    assert (own.inherited, own.end) == (False, None)
    box.processes.signal(name, "TERM")
    assert box.processes.wait(name).signal == 15
    lab.client.snapshots.delete(snapshot.id)


def test_pauses_and_reboots(lab: Lab) -> None:
    box = lab.box
    lab.says("echo here >/run/mark")
    box.pause()
    with pytest.raises(InvalidStateError):
        box.spawn(["true"])
    box.resume()
    assert lab.says("cat /run/mark") == "here"
    box.pause(to_disk=True)
    box.resume()
    assert lab.says("cat /run/mark") == "here"
    name = box.processes.start(["sleep", "77777"])
    boot = lab.says(f"cat {BOOT_ID}")
    with contextlib.suppress(ConnectionLostError), box.spawn("reboot") as process:
        process.wait()

    def booted() -> bool:
        # It goes down while it is asked, or while it looks.
        with contextlib.suppress(AgentUnavailableError, CommandFailedError):
            return lab.box.execute(f"cat {BOOT_ID}").check().stdout_text.strip() != boot
        return False

    eventually(booted, 120)
    assert lab.says("cat /run/mark 2>/dev/null || echo gone") == "gone"
    assert name not in {each.id for each in lab.box.processes.list()}


def test_a_guest_without_sshd_says_so_and_runs_commands_all_the_same(lab: Lab) -> None:
    image = lab.client.images.get("tiny")
    with lab.client.sandboxes.create(image=image.id, memory=128) as bare:
        bare.execute(f"mv /usr/sbin/sshd /usr/sbin/gone; kill -9 $({SERVERS}); sync")
        bare.stop()
        bare.start()
        with pytest.raises(NoSshdError, match="openssh-server"):
            bare.spawn(["true"])
        command = [str(STRATABOX), "sandbox", "exec", bare.id, "echo", "hi"]
        environment = os.environ | {"STRATABOX_ADDRESS": lab.process.address}
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        assert done.stdout == b"hi\n"


def test_a_guest_whose_port_says_nonsense_harms_nobody(lab: Lab) -> None:
    """Root in the guest has the port and says what it likes: only its own channel suffers."""
    with lab.client.sandboxes.create(image="tiny", memory=128) as wild:
        assert said(wild, "echo fine") == "fine"
        wild.execute(
            f"mv /usr/sbin/sshd /x; kill -9 $({SERVERS}); rm -rf /run/stratabox; >/run/stratabox;"
            " (cat /dev/urandom >/dev/vport1p2 2>/dev/null &)"
        )
        with pytest.raises(StrataboxError, match=r"sshd|/run/stratabox"):
            wild.spawn(["true"])
        assert lab.says("echo unharmed") == "unharmed"


def test_imported_keys_of_another_store_are_told_anew(
    lab: Lab, client: Client, tiny: Image
) -> None:
    """A guest in saved memory of another store knows other keys than this one's."""
    archive = lab.process.folder / "moved.sbx"
    with client.sandboxes.create(image=tiny.id, memory=128) as source:
        assert said(source, "echo there") == "there"
        snapshot = client.snapshots.create(source.id, level="memory")
    client.snapshots.export(snapshot.id, archive, memory=True)
    client.snapshots.delete(snapshot.id)
    imported = lab.client.snapshots.import_file(archive, trust=True).snapshot
    with lab.client.snapshots.restore(imported.id) as brought:
        assert said(brought, "echo here") == "here"
    lab.client.snapshots.delete(imported.id)
    archive.unlink()
