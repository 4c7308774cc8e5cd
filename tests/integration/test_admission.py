"""admission.memory: guests are refused by figures, before anything is made, and never by the OOM
killer; of many at once exactly as many start as fit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from stratabox.client import (
    AdmissionRefusedError,
    AsyncClient,
    Client,
    Sandbox,
    SandboxState,
    Snapshot,
    StrataboxError,
)
from support.daemon import DaemonProcess, daemon

MEMORY = 128
FIT = 3
"""So many guests fit."""
CROWD = 50


class Scene:
    """A daemon with a limit, and a memory snapshot."""

    def __init__(self, process: DaemonProcess) -> None:
        self.process = process
        self.client = self.start()
        self.client.images.build_tiny()
        box = self.create()
        box.wait_ready()
        self.snapshot: Snapshot = box.snapshot(level="memory")
        box.delete()

    def start(self, **limits: str) -> Client:
        """Start it with other limits than `FIT` guests' memory, where some are given."""
        limits = limits or {"MEMORY": f"{MEMORY * FIT + 1}MiB"}
        environment = {f"STRATABOX_ADMISSION_{name}": value for name, value in limits.items()}
        self.client = self.process.start(environment=environment)
        return self.client

    def start_again(self, **limits: str) -> Client:
        """Once more, with other limits; guests run on."""
        self.client.close()
        self.process.stop()
        return self.start(**limits)

    def create(self, memory: int = MEMORY) -> Sandbox:
        """A guest that boots; it is not waited for."""
        return self.client.sandboxes.create(image="tiny", memory=memory, wait_for_ready=False)

    def fill(self, count: int = FIT) -> list[Sandbox]:
        """So many guests, of the snapshot; they are not waited for."""
        return [
            self.client.snapshots.restore(self.snapshot.id, wait_for_ready=False)
            for _ in range(count)
        ]

    def in_use(self) -> int:
        return self.client.host().memory_in_use


@pytest.fixture(scope="module")
def module_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with daemon(tmp_path_factory.mktemp("admission")) as process:
        yield Scene(process)
        process.stop()


@pytest.fixture
def scene(module_scene: Scene) -> Iterator[Scene]:
    """The daemon, without any sandbox before and after."""
    yield module_scene
    for sandbox in module_scene.client.sandboxes.list():
        sandbox.delete()
    assert module_scene.in_use() == 0
    module_scene.process.check_consistent()


async def restore_many(address: str, snapshot: str) -> list[object]:
    async with AsyncClient(address) as client:
        results: list[object] = await asyncio.gather(
            *(client.snapshots.restore(snapshot, wait_for_ready=False) for _ in range(CROWD)),
            return_exceptions=True,
        )
        return results


def test_of_fifty_restores_at_once_as_many_start_as_fit(scene: Scene) -> None:
    layers = scene.process.layers()
    results = asyncio.run(restore_many(scene.process.address, scene.snapshot.id))
    refused = [each for each in results if isinstance(each, AdmissionRefusedError)]
    assert len(refused) == CROWD - FIT
    assert not [e for e in results if isinstance(e, BaseException) and e not in refused]
    for error in refused:
        assert error.metadata["resource"] == "memory"
        figures = {k: int(v) for k, v in error.metadata.items() if k != "resource"}
        assert figures == {
            "limit": MEMORY * FIT + 1,
            "in_use": MEMORY * FIT,
            "wanted": MEMORY,
            "missing": MEMORY - 1,
            "sandboxes": FIT,
        }
        assert str(MEMORY * FIT) in str(error)
    assert len(scene.process.guests()) == FIT
    assert len(scene.process.layers() - layers) == FIT
    assert scene.in_use() == MEMORY * FIT
    scene.process.check_consistent()


def test_whoever_ends_gives_the_share_back(scene: Scene) -> None:
    first, *others = scene.fill()
    with pytest.raises(AdmissionRefusedError):
        scene.create()
    first.delete()
    with pytest.raises(AdmissionRefusedError):
        scene.create(memory=MEMORY + 2)
    first = scene.create()
    first.stop(force=True)
    again = scene.create()
    # A stopped one that starts again needs room as well; refused, it stays as it was.
    with pytest.raises(AdmissionRefusedError):
        first.start()
    assert first.refresh().state is SandboxState.STOPPED
    again.delete()
    first.start(wait_for_ready=False)
    others[0].pause()
    with pytest.raises(AdmissionRefusedError):
        scene.create()  # a paused guest has its memory


def test_a_creation_that_fails_gives_it_back(scene: Scene) -> None:
    scene.fill(FIT - 1)
    for _ in range(2):
        with pytest.raises(StrataboxError) as failed:
            scene.client.sandboxes.create(image="tiny", memory=MEMORY, ready_timeout=0.01)
        assert not isinstance(failed.value, AdmissionRefusedError)
    scene.create()


def test_a_clone_makes_the_copies_that_fit(scene: Scene) -> None:
    source = scene.client.snapshots.restore(scene.snapshot.id)
    clones = source.clone(count=FIT + 1, wait_for_ready=False)
    assert len(clones.sandboxes) == FIT - 1
    assert [type(each) for each in clones.errors] == [AdmissionRefusedError] * 2
    with pytest.raises(AdmissionRefusedError):
        source.clone(count=2)
    scene.client.snapshots.delete(clones.snapshot.id)


def test_revert_is_refused_before_anything_is_changed(scene: Scene) -> None:
    box = scene.client.snapshots.restore(scene.snapshot.id)
    snapshot = box.snapshot(level="memory")
    box.stop(force=True)
    scene.fill()
    before = {each.id for each in scene.client.snapshots.list()}
    with pytest.raises(AdmissionRefusedError):
        box.revert(snapshot.id)
    assert {each.id for each in scene.client.snapshots.list()} == before
    assert box.refresh().state is SandboxState.STOPPED
    box.delete()
    scene.client.snapshots.delete(snapshot.id)


def test_a_sandbox_paused_to_disk_has_none(scene: Scene) -> None:
    first, *_ = scene.fill()
    first.wait_ready()
    first.pause(to_disk=True)
    assert scene.in_use() == MEMORY * (FIT - 1)
    another = scene.create()
    with pytest.raises(AdmissionRefusedError):
        first.resume()
    assert first.refresh().paused_to_disk
    another.delete()
    first.resume(wait_for_ready=False)
    assert scene.in_use() == MEMORY * FIT


def test_a_new_daemon_counts_what_runs(scene: Scene) -> None:
    scene.fill()
    scene.client.close()
    scene.process.kill()
    client = scene.start()
    assert client.host().memory_in_use == MEMORY * FIT
    with pytest.raises(AdmissionRefusedError):
        scene.create()
    client.sandboxes.list()[0].delete()
    scene.create()


def refused(scene: Scene) -> dict[str, str]:
    with pytest.raises(AdmissionRefusedError) as error:
        scene.client.snapshots.restore(scene.snapshot.id, wait_for_ready=False)
    return dict(error.value.metadata)


def test_what_the_host_has_not_is_not_given(scene: Scene) -> None:
    first, _ = scene.fill(2)
    try:
        # All of the host's memory is reserved, so nobody may grow.
        client = scene.start_again(MEMORY_RESERVE="16TiB")
        account = client.host().account
        figures = refused(scene)
        assert (account.memory_available, account.memory_growth_limit) == (0, 0)
        assert account.memory_total > account.memory_own > 0
        assert figures["resource"] == "host_memory"
        assert (figures["limit"], figures["sandboxes"]) == ("0", "2")
        assert int(figures["wanted"]) > MEMORY
        assert int(figures["missing"]) == int(figures["in_use"]) + int(figures["wanted"])
        first = client.sandboxes.get(first.id)
        first.stop(force=True)
        with pytest.raises(AdmissionRefusedError):
            first.start()

        client = scene.start_again(SANDBOXES="1")
        assert refused(scene)["resource"] == "sandboxes"
        assert client.host().account.sandboxes == 1

        scene.start_again(DISK_OVERCOMMIT="0.000001")
        figures = refused(scene)
        assert figures["resource"] == "disk"
        assert int(figures["wanted"]) > 0
    finally:
        scene.start_again()


def test_a_copy_owns_what_it_has_written(scene: Scene) -> None:
    """Until it writes a page of saved memory, that is there once; it can still grow by it."""
    copy = scene.client.snapshots.restore(scene.snapshot.id)
    before = scene.client.host().account
    assert before.memory_granted == MEMORY
    assert 0 < before.memory_own < MEMORY
    assert copy.execute("dd if=/dev/zero of=/dev/shm/x bs=1M count=16").exit_code == 0
    after = scene.client.host().account
    assert after.memory_own - before.memory_own >= 14
    assert after.memory_own + after.memory_growth == before.memory_own + before.memory_growth
