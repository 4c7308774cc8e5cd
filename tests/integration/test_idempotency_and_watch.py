"""Asking twice, following changes, and going away: what a client may do at any time."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import pytest

from stratabox.client import (
    AgentUnavailableError,
    AsyncClient,
    AsyncSandbox,
    Client,
    DeadlineExceededError,
    EventType,
    IdempotencyMismatchError,
    Image,
    Sandbox,
    SnapshotEvent,
    SnapshotState,
)
from support.daemon import DaemonProcess
from support.rig import wait_idle
from support.stored import wait_until
from support.waiting import watching

T = TypeVar("T")
Shell = Callable[[Sandbox, str], str]

PRESENT, CREATED, UPDATED, DELETED = (
    EventType.PRESENT, EventType.CREATED, EventType.UPDATED, EventType.DELETED,
)  # fmt: skip


@pytest.fixture
def key() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def idle(client: Client, tiny: Image) -> Iterator[Sandbox]:
    """A sandbox whose guest never gets to run."""
    with client.sandboxes.create(image=tiny.id, memory=128, wait_for_ready=False) as sandbox:
        yield sandbox.stop(force=True)


def at_once(count: int, call: Callable[[], T]) -> list[T]:
    with ThreadPoolExecutor(count) as pool:
        return [one.result() for one in [pool.submit(call) for _ in range(count)]]


# -- the same key again ---------------------------------------------------------------------------


def test_creating_twice_makes_one(client: Client, tiny: Image, key: str) -> None:
    def create(memory: int = 128) -> Sandbox:
        return client.sandboxes.create(
            image=tiny.id, memory=memory, wait_for_ready=False, idempotency_key=key
        )

    first, *others = at_once(4, create)
    with first:
        assert {one.id for one in others} == {first.id}
        with pytest.raises(IdempotencyMismatchError) as caught:
            create(memory=256)
        assert caught.value.metadata["idempotency_key"] == key
        with pytest.raises(IdempotencyMismatchError):
            first.snapshot(idempotency_key=key)
        first.update(name="renamed")
        assert create().name == "renamed"


def test_another_request_while_the_first_is_under_way(
    client: Client, tiny: Image, idle: Sandbox, key: str
) -> None:
    with ThreadPoolExecutor(1) as pool, watching(client) as events:
        assert next(events).type is PRESENT  # there is the idle one at least
        first = pool.submit(
            client.sandboxes.create, image=tiny.id, memory=128, name=key, idempotency_key=key
        )
        next(event for event in events if event.sandbox.name == key)
        with pytest.raises(IdempotencyMismatchError, match="is being used"):
            client.sandboxes.create(image=tiny.id, memory=256, name=key, idempotency_key=key)
        with first.result() as sandbox:
            assert sandbox.ready
            assert [one.id for one in client.sandboxes.list(name=key)] == [sandbox.id]


def test_snapshots_restores_and_clones_once(client: Client, idle: Sandbox, key: str) -> None:
    snapshots = at_once(4, lambda: idle.snapshot(idempotency_key=key))
    snapshot = snapshots[0]
    assert snapshots == [snapshot] * 4
    assert client.snapshots.list(sandbox=idle.id) == [snapshot]
    with pytest.raises(IdempotencyMismatchError):
        idle.snapshot(quick=True, idempotency_key=key)

    def restore() -> Sandbox:
        return client.snapshots.restore(
            snapshot.id, memory=128, wait_for_ready=False, idempotency_key=f"{key}-restore"
        )

    restored, *others = at_once(3, restore)
    with restored:
        assert {one.id for one in others} == {restored.id}
        with pytest.raises(IdempotencyMismatchError):
            client.snapshots.restore(snapshot.id, idempotency_key=f"{key}-restore")
    clones = at_once(
        3, lambda: idle.clone(count=2, wait_for_ready=False, idempotency_key=f"{key}-clone")
    )
    clones.append(idle.clone(count=2, wait_for_ready=False, idempotency_key=f"{key}-clone"))
    made = {one.id for clone in clones for one in clone.sandboxes}
    assert len(made) == 2
    assert len({clone.snapshot.id for clone in clones}) == 1
    with pytest.raises(IdempotencyMismatchError):
        idle.clone(count=3, wait_for_ready=False, idempotency_key=f"{key}-clone")
    for one in made:
        client.sandboxes.delete(one)
    client.snapshots.delete(clones[0].snapshot.id)
    client.snapshots.delete(snapshot.id)


def test_what_failed_holds_no_key(client: Client, tiny: Image, idle: Sandbox, key: str) -> None:
    for _ in range(2):  # the second time it is tried again, and not looked up
        with pytest.raises(AgentUnavailableError):
            client.sandboxes.create(
                image=tiny.id, memory=128, name=key, ready_timeout=0.05, idempotency_key=key
            )
        with pytest.raises(AgentUnavailableError):
            idle.clone(name=key, ready_timeout=0.05, idempotency_key=f"{key}-clone")
    assert client.sandboxes.list(name=key, include_terminated=True) == []
    assert client.snapshots.list(sandbox=idle.id) == []


def test_keys_outlive_the_daemon(own_daemon: DaemonProcess, key: str) -> None:
    def ask(client: Client) -> list[str]:
        made = client.sandboxes.create(
            image="tiny", memory=128, wait_for_ready=False, idempotency_key=key
        )
        clone = made.clone(wait_for_ready=False, idempotency_key=f"{key}-clone")
        snapshot = made.snapshot(quick=True, idempotency_key=f"{key}-snapshot")
        restored = client.snapshots.restore(
            snapshot.id, wait_for_ready=False, idempotency_key=f"{key}-restore"
        )
        return [made.id, clone.snapshot.id, clone.sandbox.id, snapshot.id, restored.id]

    with own_daemon.start() as client:
        client.images.build_tiny()
        before = ask(client)
        for sandbox in client.sandboxes.list():
            sandbox.pause()
    own_daemon.kill()
    with own_daemon.start() as client:
        assert ask(client) == before
        with pytest.raises(IdempotencyMismatchError):
            client.sandboxes.create(image="tiny", idempotency_key=key)
        assert len(client.sandboxes.list()) == 3
    own_daemon.check_consistent()


# -- watch ----------------------------------------------------------------------------------------


def test_every_change_of_a_sandbox_is_told_once(client: Client, tiny: Image, idle: Sandbox) -> None:
    with watching(client) as events:
        assert next(events).type is PRESENT
        sandbox = client.sandboxes.create(image=tiny.id, memory=128, name="watched")
        sandbox.pause()
        sandbox.resume()
        sandbox.update(tags=["t"])
        sandbox.stop(force=True)
        sandbox.delete()
        told = []
        for event in events:
            if event.sandbox.id == sandbox.id:
                told.append(event)
                if event.type is DELETED:
                    break
    assert [(one.type, str(one.sandbox.state), one.sandbox.ready) for one in told] == [
        (CREATED, "creating", False),
        (UPDATED, "running", False),
        (UPDATED, "running", True),
        (UPDATED, "paused", True),
        (UPDATED, "running", True),
        (UPDATED, "running", True),
        (UPDATED, "stopped", False),
        (UPDATED, "terminating", False),
        (UPDATED, "terminated", False),
        (DELETED, "terminated", False),
    ]
    generations = [one.sandbox.generation for one in told[:-1]]
    assert generations == sorted(set(generations))
    assert [one.time for one in told] == sorted(one.time for one in told)


def test_every_change_of_a_snapshot_is_told_once(
    client: Client, shared_daemon: DaemonProcess, tiny: Image, idle: Sandbox
) -> None:
    other = idle.snapshot(name="present")
    events = client.snapshots.watch()
    assert next(events).type is PRESENT
    only_of_idle = client.snapshots.watch(sandbox=idle.id)
    assert next(only_of_idle).snapshot == other

    sandbox = client.sandboxes.create(image=tiny.id, memory=128, wait_for_ready=False)
    snapshot = sandbox.snapshot(quick=True, metadata={"k": "v"})
    client.snapshots.update(snapshot.id, name="renamed")
    layer = shared_daemon.state / "layers" / f"{_layer_of(shared_daemon, snapshot.id)}.qcow2"
    deletion = client.snapshots.delete(snapshot.id)
    # The sandbox stands on what it sealed, so nothing comes free.
    assert (deletion.freed_bytes, deletion.kept_for) == (0, (sandbox.id,))
    assert deletion.kept_bytes == layer.stat().st_blocks * 512
    told = _until_deleted(events, snapshot.id)
    assert [(one.type, one.snapshot.state) for one in told] == [
        (CREATED, SnapshotState.CREATING),
        (UPDATED, SnapshotState.READY),
        (UPDATED, SnapshotState.READY),
        (DELETED, SnapshotState.READY),
    ]
    assert told[-1].snapshot.name == "renamed"
    assert told[-1].freed_bytes == 0

    last = sandbox.snapshot(quick=True)
    sandbox.delete()
    # Now the first one's layer has gone into the last one's, and nothing else comes and goes.
    wait_idle(shared_daemon)
    held = shared_daemon.layers() - {f"{_layer_of(shared_daemon, other.id)}.qcow2"}
    before = _bytes(shared_daemon)
    deletion = client.snapshots.delete(last.id)
    freed = before - _bytes(shared_daemon)
    assert held - shared_daemon.layers()
    assert freed > 0
    assert (deletion.freed_bytes, deletion.kept_bytes, deletion.kept_for) == (freed, 0, ())
    assert _until_deleted(events, last.id)[-1].freed_bytes == freed

    client.snapshots.delete(other.id)
    told = _until_deleted(only_of_idle, other.id)
    assert [one.type for one in told] == [DELETED]  # and nothing of the others


def _layer_of(daemon: DaemonProcess, snapshot: str) -> object:
    query = f"SELECT layer FROM snapshot_disks WHERE snapshot = '{snapshot}'"
    return daemon.rows(query)[0][0]


def _bytes(daemon: DaemonProcess) -> int:
    return sum(path.stat().st_blocks * 512 for path in (daemon.state / "layers").iterdir())


def _until_deleted(events: Iterator[SnapshotEvent], snapshot: str) -> list[SnapshotEvent]:
    told = []
    for event in events:
        if event.snapshot.id == snapshot:
            told.append(event)
        if event.type is DELETED and event.snapshot.id == snapshot:
            break
    return told


def test_only_changes_and_only_some(client: Client, idle: Sandbox, tiny: Image) -> None:
    with client.sandboxes.create(image=tiny.id, memory=128, wait_for_ready=False) as other:
        with watching(client, idle.id, other.name) as events:
            assert {next(events).sandbox.id, next(events).sandbox.id} == {idle.id, other.id}
        events = client.sandboxes.watch(sandboxes=[other.id], changes_only=True)
        with watching(client, other.id) as present, ThreadPoolExecutor(1) as pool:
            next(present)
            first = pool.submit(next, events)
            while not first.done():  # until the watch has begun, changes are not for it
                idle.update(tags=[uuid.uuid4().hex])
                other.update(tags=[uuid.uuid4().hex])
            assert (first.result().type, first.result().sandbox.id) == (UPDATED, other.id)


# -- going away -----------------------------------------------------------------------------------


def test_a_deadline_ends_the_waiting_and_not_the_snapshot(
    client: Client, module_box: Sandbox, sh: Shell
) -> None:
    hook = "/etc/qemu/fsfreeze-hook.d/slow"
    line = "[ $1 = thaw ] || until [ -e /run/go-on ]; do usleep 20000; done"
    sh(module_box, f"printf '#!/bin/sh\\n{line}\\n' >{hook}; chmod +x {hook}")
    # The agent does nothing else meanwhile; what was begun before goes on.
    with module_box.spawn("read line; touch /run/go-on", stdin=True) as process:
        with Client(client.address, timeout=2) as hasty, pytest.raises(DeadlineExceededError):
            hasty.snapshots.create(module_box.id, name="goes on", level="application")
        snapshot = client.snapshots.get("goes on")
        assert snapshot.state is SnapshotState.CREATING
        with pytest.raises(DeadlineExceededError):
            client.snapshots.wait_ready(snapshot.id, timeout=0.1)
        process.write(b"\n")
        assert process.wait().ok
    ready = client.snapshots.wait_ready(snapshot.id, timeout=60)
    assert (ready.state, ready.consistency) == ("ready", "application")
    # Not waiting at all comes to the same.
    begun = module_box.snapshot(wait=False)
    assert begun.state is SnapshotState.CREATING
    assert client.snapshots.wait_ready(begun.id).state is SnapshotState.READY
    sh(module_box, f"rm {hook} /run/go-on")
    for one in (begun, ready):
        client.snapshots.delete(one.id)


async def test_who_goes_away_from_a_create_restore_or_clone_leaves_nothing(
    own_daemon: DaemonProcess,
) -> None:
    with own_daemon.start() as client:
        client.images.build_tiny()
        source = client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False)
        source = source.stop(force=True)
        snapshot = source.snapshot(name="base")
        async with AsyncClient(own_daemon.address) as asking:
            sandboxes, snapshots = asking.sandboxes, asking.snapshots
            calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
                lambda: sandboxes.create(image="tiny", memory=128),
                lambda: sandboxes.create(image="tiny", memory=128, idempotency_key="k"),
                lambda: snapshots.restore(snapshot.id),
                lambda: sandboxes.clone(source.id, count=3),
            ]
            # Given up when its copies run, and then before that: when the first is written down.
            for state in ("running", "creating"):
                for call in calls:
                    await _give_up(asking, call, state)
        # The others of a clone go last, and its snapshot.
        wait_until(lambda: len(client.sandboxes.list(include_terminated=True)) == 1)
        wait_until(lambda: client.snapshots.list() == [snapshot])
        wait_until(lambda: own_daemon.rows("SELECT kind FROM operations") == [])
        own_daemon.check_consistent()
        assert [one.id for one in client.sandboxes.list()] == [source.id]


async def _give_up(
    asking: AsyncClient, call: Callable[[], Coroutine[Any, Any, object]], state: str
) -> None:
    """Cancel a call when one of its sandboxes has reached a state; see that one go."""
    events = asking.sandboxes.watch()
    present = await anext(events)
    assert present.type is PRESENT
    old = {one.id for one in await asking.sandboxes.list()}
    task = asyncio.create_task(call())
    made = ""
    async for event in events:
        if event.sandbox.id in old:
            continue
        if not made and event.sandbox.state == state:
            made = event.sandbox.id
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        if event.type is DELETED and event.sandbox.id == made:
            return


async def test_one_of_two_may_go(client: Client, tiny: Image, idle: Sandbox, key: str) -> None:
    async with AsyncClient(client.address) as asking:

        async def create() -> AsyncSandbox:
            return await asking.sandboxes.create(image=tiny.id, memory=128, idempotency_key=key)

        events = asking.sandboxes.watch()
        assert (await anext(events)).type is PRESENT
        tasks = [asyncio.create_task(create()) for _ in range(2)]
        async for event in events:
            if event.type is CREATED:
                break
        tasks[0].cancel()
        with suppress(asyncio.CancelledError):
            await tasks[0]
        async with await tasks[1] as sandbox:
            assert sandbox.ready
            assert (await sandbox.execute("echo here")).stdout == b"here\n"
