"""The life of sandboxes, from create to delete, and what they do by themselves."""

from __future__ import annotations

import os
import signal
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stratabox.client import (
    AmbiguousNameError,
    Client,
    EventType,
    Image,
    InvalidArgumentError,
    InvalidStateError,
    Sandbox,
    SandboxNotFoundError,
    SandboxState,
)
from support.agents import soon
from support.boot_disks import boot_disk, say
from support.daemon import DaemonProcess
from support.stored import Stored
from support.waiting import until, watching

Shell = Callable[[Sandbox, str], str]
GIB = 1 << 30


@pytest.fixture
def idle(client: Client, tiny: Image) -> Iterator[Callable[..., Sandbox]]:
    """Makes sandboxes whose guests are never waited for, and hardly run: they cost a moment."""
    made: list[Sandbox] = []

    def make(**options: object) -> Sandbox:
        sandbox = client.sandboxes.create(
            **{"image": tiny.id, "memory": 128, "wait_for_ready": False, **options}  # type: ignore[arg-type]
        )
        made.append(sandbox)
        return sandbox.pause()

    yield make
    for sandbox in made:
        with sandbox:
            pass


@pytest.fixture(scope="module")
def full_box(client: Client, tiny: Image) -> Iterator[Sandbox]:
    """A sandbox of which everything was said that can be said."""
    with client.sandboxes.create(
        image=tiny.id,
        name="Full böx; $(x)",
        cpus=2,
        memory=300,
        storage=2,
        env={"GREETING": "hello  world", "HOME": "/tmp"},
        metadata={"team": "db\n/"},
        tags=["nightly", "x y", "nightly"],
        data_disks=[1, 3],
        ready_timeout=120,
    ) as sandbox:
        yield sandbox


# -- create ---------------------------------------------------------------------------------------


def test_what_is_not_said_is_made_up_or_a_default(client: Client, tiny: Image) -> None:
    before = datetime.now(UTC)
    with client.sandboxes.create(image="tiny", wait_for_ready=False) as sandbox:
        assert str(uuid.UUID(sandbox.id)) == sandbox.id
        assert sandbox.name
        assert (sandbox.state, sandbox.ready, sandbox.state_reason) == ("running", False, None)
        assert (sandbox.image_id, sandbox.image_name) == (tiny.id, "tiny")
        assert sandbox.source_snapshot_id is None
        assert (sandbox.cpus, sandbox.memory, sandbox.storage) == (1, 512, 1)
        assert (sandbox.env, sandbox.metadata, sandbox.tags) == ({}, {}, ())
        assert before <= sandbox.created_at <= sandbox.updated_at <= datetime.now(UTC)
        assert sandbox.started_at is not None
        assert (sandbox.ready_at, sandbox.terminated_at) == (None, None)
        [disk] = sandbox.disks
        assert (disk.index, disk.size_bytes, disk.chain_depth) == (0, tiny.size_bytes, 2)
        host = client.host()
        assert sandbox.machine is not None
        assert sandbox.machine.machine_type.startswith("pc-q35-")
        assert sandbox.machine.accelerator == host.accelerator
        assert sandbox.machine.qemu_version == host.qemu_version
        with client.sandboxes.create(image="tiny", wait_for_ready=False) as other:
            assert other.name != sandbox.name
            assert other.generation > sandbox.generation


def test_everything_that_is_said_is_in_the_record(client: Client, full_box: Sandbox) -> None:
    assert full_box.name == "Full böx; $(x)"
    assert (full_box.cpus, full_box.memory, full_box.storage) == (2, 300, 2)
    assert full_box.env == {"GREETING": "hello  world", "HOME": "/tmp"}
    assert full_box.metadata == {"team": "db\n/"}
    assert full_box.tags == ("nightly", "x y")
    assert [disk.size_bytes for disk in full_box.disks] == [2 * GIB, GIB, 3 * GIB]
    assert [disk.chain_depth for disk in full_box.disks] == [2, 1, 1]
    assert full_box.ready
    assert full_box.ready_at is not None
    assert full_box.started_at is not None
    assert full_box.created_at <= full_box.started_at <= full_box.ready_at
    assert client.sandboxes.get(full_box.id) == full_box


def test_the_guest_has_what_was_said(full_box: Sandbox, sh: Shell) -> None:
    assert sh(full_box, "nproc") == "2"
    total = int(sh(full_box, "awk '/^MemTotal/ {print $2}' /proc/meminfo"))
    assert 200 * 1024 < total < 300 * 1024
    sizes = sh(full_box, "cat /sys/block/vda/size /sys/block/vdb/size /sys/block/vdc/size")
    assert [int(size) * 512 for size in sizes.split()] == [2 * GIB, GIB, 3 * GIB]
    serials = sh(full_box, "for d in vda vdb vdc; do cat /sys/block/$d/serial; echo; done")
    assert serials.split() == [disk.serial for disk in full_box.disks]
    grown = int(sh(full_box, "df -k / | awk 'END {print $(NF-4)}'"))
    assert grown * 1024 > 1.8 * GIB


def test_data_disks_are_empty_and_can_be_written(full_box: Sandbox, sh: Shell) -> None:
    assert sh(full_box, "head -c 1048576 /dev/vdc | tr -d '\\0' | wc -c") == "0"
    sh(full_box, "mke2fs /dev/vdb >/dev/null 2>&1 || mkfs.ext2 /dev/vdb >/dev/null")
    sh(full_box, "mount -t ext2 /dev/vdb /mnt && echo kept >/mnt/file && umount /mnt")
    assert sh(full_box, "mount -t ext2 /dev/vdb /mnt && cat /mnt/file && umount /mnt") == "kept"


def test_env_goes_to_every_command_and_the_commands_own_over_it(
    full_box: Sandbox, sh: Shell
) -> None:
    assert sh(full_box, 'echo "$GREETING"; pwd') == "hello  world\n/tmp"
    result = full_box.execute('echo "$GREETING $MORE"', env={"GREETING": "bye", "MORE": "now"})
    assert result.stdout == b"bye now\n"
    assert sh(full_box, 'echo "$GREETING $MORE"') == "hello  world "


def test_not_waiting_and_waiting_later(client: Client, tiny: Image, sh: Shell) -> None:
    with client.sandboxes.create(image=tiny.id, memory=128, wait_for_ready=False) as sandbox:
        assert not sandbox.ready
        ready = sandbox.wait_ready(timeout=120)
        assert ready.ready
        assert sh(ready, "echo hi") == "hi"
        assert ready.wait_ready() == ready


# -- find -----------------------------------------------------------------------------------------


def test_by_id_by_name_and_by_the_start_of_an_id(
    client: Client, idle: Callable[..., Sandbox]
) -> None:
    one, two = idle(name="twin"), idle(name="lone")
    for reference in (one.id, "twin", one.id[:13]):
        assert client.sandboxes.get(reference).id == one.id
    idle(name="twin")
    with pytest.raises(AmbiguousNameError) as caught:
        client.sandboxes.pause("twin")
    assert one.id in caught.value.metadata["ids"].split(",")
    assert client.sandboxes.get("lone").id == two.id
    # Of two with a name, the one that lives.
    two.terminate()
    assert client.sandboxes.get("lone").state == "terminated"
    three = idle(name="lone")
    assert client.sandboxes.get("lone").id == three.id
    assert client.sandboxes.get(two.id).state == "terminated"


def test_lists_and_their_filters(client: Client, tiny: Image, idle: Callable[..., Sandbox]) -> None:
    mark = {"mark": uuid.uuid4().hex}
    boxes = [
        idle(metadata=mark | {"n": str(n)}, tags=["even"] if n % 2 == 0 else ["odd", "x"])
        for n in range(5)
    ]
    boxes[0].resume()
    boxes[4].terminate()

    def listed(**filters: object) -> list[int]:
        found = client.sandboxes.list(**{"metadata": mark} | filters)  # type: ignore[arg-type]
        return [int(box.metadata["n"]) for box in found]

    assert listed() == [3, 2, 1, 0]  # newest first, and not those that are over
    assert listed(include_terminated=True) == [4, 3, 2, 1, 0]
    assert listed(states=["running"]) == [0]
    assert listed(states=[SandboxState.RUNNING, "terminated"]) == [4, 0]
    assert listed(tags=["odd"]) == [3, 1]
    assert listed(tags=["odd", "even"]) == []
    assert listed(tags=["odd", "x"]) == [3, 1]
    assert listed(metadata=mark | {"n": "2"}) == [2]
    assert listed(metadata=mark | {"n": "9"}) == []
    assert listed(name=boxes[1].name) == [1]
    assert listed(name="nobody") == []
    assert listed(image=tiny.name) == [3, 2, 1, 0]
    with pytest.raises(InvalidArgumentError):
        listed(states=["sleeping"])


def test_pages(client: Client, idle: Callable[..., Sandbox]) -> None:
    mark = {"mark": uuid.uuid4().hex}
    boxes = [idle(metadata=mark).id for _ in range(5)]
    seen: list[str] = []
    sizes = []
    token = None
    while True:
        page = client.sandboxes.list_page(page_size=2, page_token=token, metadata=mark)
        seen += [box.id for box in page.items]
        sizes.append(len(page.items))
        if len(sizes) == 1:
            idle(metadata=mark)  # a newer one shifts nothing
        if (token := page.next_page_token) is None:
            break
    assert sizes == [2, 2, 1]
    assert seen == boxes[::-1]
    for wrong in ({"page_token": "bogus"}, {"page_size": 1001}, {"page_size": -1}):
        with pytest.raises(InvalidArgumentError):
            client.sandboxes.list_page(**wrong)


# -- change ---------------------------------------------------------------------------------------


def test_update_replaces_what_is_named(client: Client, module_box: Sandbox, sh: Shell) -> None:
    before = client.sandboxes.get(module_box.id)
    changed = module_box.update(
        name="renamed", env={"A": "1"}, metadata={"k": "v"}, tags=["t", "u", "t"]
    )
    assert (changed.name, changed.env, changed.metadata) == ("renamed", {"A": "1"}, {"k": "v"})
    assert changed.tags == ("t", "u")
    assert changed.generation > before.generation
    assert sh(module_box, "echo $A") == "1"
    assert client.sandboxes.update("renamed", metadata={}).metadata == {}
    kept = module_box.refresh()
    assert (kept.name, kept.env, kept.tags) == ("renamed", {"A": "1"}, ("t", "u"))
    with pytest.raises(InvalidArgumentError):
        module_box.update()
    with pytest.raises(InvalidArgumentError):
        module_box.update(name="a/b", env={"B": "2"})
    assert module_box.refresh() == kept
    module_box.update(name=before.name, env={}, tags=[])


def test_pause_and_resume(module_box: Sandbox, sh: Shell) -> None:
    sh(module_box, "echo in memory >/dev/shm/note")
    for _ in range(2):  # the second time changes nothing
        paused = module_box.pause()
        assert (paused.state, paused.state_reason) == ("paused", "paused by request")
    with pytest.raises(InvalidStateError, match="paused"):
        module_box.start()
    for _ in range(2):
        resumed = module_box.resume()
        assert (resumed.state, resumed.state_reason, resumed.ready) == ("running", None, True)
    assert sh(module_box, "cat /dev/shm/note") == "in memory"


def test_stop_and_start(shared_daemon: DaemonProcess, module_box: Sandbox, sh: Shell) -> None:
    with pytest.raises(InvalidStateError, match="running"):
        module_box.start()
    boot = sh(module_box, "echo not synced >/root/note; cat /proc/sys/kernel/random/boot_id")
    for _ in range(2):
        stopped = module_box.stop()
        assert (stopped.state, stopped.state_reason) == ("stopped", "shut down by request")
        assert not stopped.ready
    assert module_box.id not in shared_daemon.guests()
    for refused in (module_box.pause, module_box.resume):
        with pytest.raises(InvalidStateError, match="stopped"):
            refused()
    started = module_box.start()
    assert (started.state, started.ready, started.state_reason) == ("running", True, None)
    assert sh(module_box, "cat /root/note") == "not synced"
    assert sh(module_box, "cat /proc/sys/kernel/random/boot_id") != boot

    # A guest that agrees to shut down, and does not.
    sh(
        module_box,
        "echo '#!/bin/sh' >/tmp/no; chmod +x /tmp/no; mount -o bind /tmp/no /sbin/shutdown",
    )
    stopped = module_box.stop(timeout=1)
    assert stopped.state_reason == "power cut: the guest did not shut down in time"
    module_box.start(wait_for_ready=False)
    stopped = module_box.stop(force=True)
    assert stopped.state_reason == "power cut: by request"
    assert module_box.start().ready


def test_a_guest_that_cannot_be_asked_to_shut_down(client: Client, tmp_path: Path) -> None:
    boot_disk(tmp_path / "mute.raw", say("no agent in here"))
    image = client.images.import_file(tmp_path / "mute.raw", name="cannot-be-asked")
    with client.sandboxes.create(image=image.id, memory=128, wait_for_ready=False) as sandbox:
        stopped = sandbox.stop()
        assert stopped.state_reason == "power cut: the guest's agent had not answered yet"
    client.images.delete(image.id)


# -- end ------------------------------------------------------------------------------------------


def test_terminate_keeps_the_record_and_delete_removes_it(
    client: Client, shared_daemon: DaemonProcess, idle: Callable[..., Sandbox]
) -> None:
    sandbox = idle(name="mortal")
    layer = Stored(shared_daemon).of_sandbox(sandbox.id)
    assert layer.exists()
    over = sandbox.terminate()
    assert (over.state, over.disks, over.ready) == ("terminated", (), False)
    assert over.terminated_at is not None
    assert sandbox.terminate() == over == client.sandboxes.get("mortal")
    assert not layer.exists()
    assert sandbox.id not in shared_daemon.guests()
    for refused in (sandbox.start, sandbox.stop, sandbox.pause, sandbox.resume, sandbox.snapshot):
        with pytest.raises(InvalidStateError, match="terminated"):
            refused()
    sandbox.delete()
    for gone in (sandbox.refresh, sandbox.delete, sandbox.terminate, sandbox.start):
        with pytest.raises(SandboxNotFoundError):
            gone()


def test_delete_ends_what_runs(
    client: Client, shared_daemon: DaemonProcess, idle: Callable[..., Sandbox]
) -> None:
    sandbox = idle()
    sandbox.resume()
    sandbox.delete()
    assert sandbox.id not in shared_daemon.guests()
    assert not (shared_daemon.state / "sandboxes" / sandbox.id).exists()
    assert sandbox.id not in {box.id for box in client.sandboxes.list(include_terminated=True)}


def test_deletes_at_once(client: Client, idle: Callable[..., Sandbox]) -> None:
    sandbox = idle()

    def delete(_: int) -> str:
        try:
            sandbox.delete()
        except SandboxNotFoundError:
            return "gone"
        return "deleted"

    with watching(client, sandbox.id) as events, ThreadPoolExecutor(4) as pool:
        assert next(events).type is EventType.PRESENT
        assert sorted(pool.map(delete, range(4))) == ["deleted", "gone", "gone", "gone"]
        idle().delete()
        kinds = []
        for event in events:
            kinds.append((event.type, event.sandbox.state))
            if event.type is EventType.DELETED:
                break
        assert kinds == [
            (EventType.UPDATED, "terminating"),
            (EventType.UPDATED, "terminated"),
            (EventType.DELETED, "terminated"),
        ]


# -- by themselves --------------------------------------------------------------------------------


def test_a_guest_that_powers_itself_off_is_stopped(client: Client, box: Sandbox) -> None:
    with watching(client, box.id) as events:
        soon(box, "poweroff")
        record = next(event.sandbox for event in events if event.sandbox.state != "running")
    assert (record.state, record.state_reason) == ("stopped", "The guest powered itself off.")
    assert not record.ready


def test_a_lost_qemu_is_a_failed_sandbox_that_can_be_started(
    client: Client, shared_daemon: DaemonProcess, box: Sandbox, sh: Shell
) -> None:
    sh(box, "echo synced >/root/note; sync")
    os.kill(shared_daemon.guests()[box.id], signal.SIGKILL)
    record = until(client, box.id, lambda sandbox: sandbox.state != "running")
    assert record.state is SandboxState.FAILED
    assert record.state_reason is not None
    assert "QEMU" in record.state_reason
    if client.host().launcher == "qemu":  # only its parent is told how a process ended
        assert "signal" in record.state_reason or "SIGKILL" in record.state_reason
    with pytest.raises(InvalidStateError, match="failed"):
        box.execute("true")
    started = box.start()
    assert (started.state, started.ready, started.state_reason) == ("running", True, None)
    assert sh(box, "cat /root/note") == "synced"


def test_a_kernel_panic_is_seen(client: Client, box: Sandbox) -> None:
    box.execute(
        "while ! [ -e /sys/bus/pci/drivers/pvpanic-pci ]; do usleep 50000; done", timeout=300
    ).check()
    soon(box, "echo c >/proc/sysrq-trigger")
    record = until(client, box.id, lambda sandbox: sandbox.state != "running")
    assert record.state is SandboxState.FAILED
    assert record.state_reason is not None
    assert record.state_reason.startswith("the guest's kernel panicked")
    assert "sysrq" in record.state_reason.lower()


def test_a_guest_that_reboots_is_ready_again(
    client: Client, module_box: Sandbox, sh: Shell
) -> None:
    boot = sh(module_box, "cat /proc/sys/kernel/random/boot_id")
    with watching(client, module_box.id) as events:
        assert next(events).sandbox.ready
        soon(module_box, "reboot")
        reset = next(events).sandbox
        assert (reset.state, reset.ready) == ("running", False)
        assert reset.state_reason == "the guest was reset; its agent has not answered yet"
        again = next(events).sandbox
        assert (again.state, again.ready, again.state_reason) == ("running", True, None)
    assert sh(module_box, "cat /proc/sys/kernel/random/boot_id") != boot


# -- the daemon's end is not theirs ---------------------------------------------------------------


def test_guests_outlive_the_daemon(own_daemon: DaemonProcess, sh: Shell) -> None:
    client = own_daemon.start()
    client.images.build_tiny()
    sandbox = client.sandboxes.create(image="tiny", memory=128, env={"A": "b"})
    paused = client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False).pause()
    boot = sh(sandbox, "cat /proc/sys/kernel/random/boot_id")
    guests = own_daemon.guests()
    for end in (own_daemon.kill, own_daemon.stop):
        end()
        client.close()
        client = own_daemon.start()
        assert own_daemon.guests() == guests
        again = client.sandboxes.wait_ready(sandbox.id, timeout=300)
        assert (again.state, again.env, again.started_at) == (
            "running", {"A": "b"}, sandbox.started_at,
        )  # fmt: skip
        assert sh(again, "cat /proc/sys/kernel/random/boot_id; echo $A") == f"{boot}\nb"
        assert client.sandboxes.get(paused.id).state is SandboxState.PAUSED
    assert client.sandboxes.resume(paused.id).state is SandboxState.RUNNING
    own_daemon.check_consistent()

    # Guests that end while nobody looks: one by itself, then all with their host.
    own_daemon.kill()
    client.close()
    own_daemon.kill_guest(paused.id)
    client = own_daemon.start()
    lost = client.sandboxes.get(paused.id)
    assert (lost.state, lost.state_reason) == (
        "stopped", "its QEMU ended while the daemon was away",
    )  # fmt: skip
    own_daemon.kill()
    client.close()
    own_daemon.kill_guest(sandbox.id)
    with closing(sqlite3.connect(own_daemon.state / "catalog.db")) as catalog, catalog:
        catalog.execute("UPDATE store SET boot_id = ?", (str(uuid.uuid4()),))
    client = own_daemon.start()
    lost = client.sandboxes.get(sandbox.id)
    assert (lost.state, lost.state_reason) == ("stopped", "the host was restarted")
    assert not lost.ready
    client.sandboxes.delete(sandbox.id)
    client.sandboxes.delete(paused.id)
    own_daemon.check_consistent()
    client.close()
