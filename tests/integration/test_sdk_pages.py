"""The examples of a snapshot page for sandboxes, in Python: what people come for.

A file write stands for the installs of packages, because guests have no network yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from stratabox.client import (
    AsyncClient,
    Client,
    CommandFailedError,
    Image,
    Sandbox,
    SandboxNotFoundError,
    SnapshotLevel,
    SnapshotNotFoundError,
    SnapshotState,
)

Shell = Callable[[Sandbox, str], str]


def test_create_list_and_delete_snapshots(client: Client, module_box: Sandbox) -> None:
    before = datetime.now(UTC)
    snapshot = client.sandboxes.snapshot(module_box.id, name="pre-deployment-backup", quick=True)
    assert snapshot.state is SnapshotState.READY
    assert snapshot.consistency is SnapshotLevel.CRASH
    assert before <= snapshot.created_at <= datetime.now(UTC)
    assert (snapshot.source_sandbox_id, snapshot.source_sandbox_name) == (
        module_box.id, module_box.name,
    )  # fmt: skip
    listed = {one.id: (one.name, one.created_at) for one in client.snapshots.list()}
    assert listed[snapshot.id] == ("pre-deployment-backup", snapshot.created_at)
    client.snapshots.delete(snapshot.id)
    with pytest.raises(SnapshotNotFoundError):
        client.snapshots.get(snapshot.id)


def test_pre_deployment_backup(client: Client, module_box: Sandbox) -> None:
    sandbox = module_box
    client.sandboxes.execute(sandbox.id, "mkdir -p /srv; echo v1 >/srv/app").check()
    client.sandboxes.execute(
        sandbox.id, "printf '#!/bin/sh\\necho broken >/srv/app\\nexit 7\\n' >/root/deploy.sh"
    ).check()

    # Snapshot the current state.
    backup = client.sandboxes.snapshot(
        sandbox.id, name=f"pre-deploy-{datetime.now(UTC):%Y-%m-%dT%H%M%S}"
    )
    assert backup.consistency is SnapshotLevel.APPLICATION
    try:
        # Deploy changes.
        client.sandboxes.execute(sandbox.id, "sh ./deploy.sh").check()
    except CommandFailedError as error:
        assert error.result.exit_code == 7  # noqa: PT017 (the page's own shape)
        # Roll back on failure.
        restored = client.snapshots.restore(backup.id, name="restored-from-backup")
    with restored:
        assert restored.ready
        assert restored.execute("cat /srv/app").stdout_text == "v1\n"
        assert sandbox.execute("cat /srv/app").stdout_text == "broken\n"
    client.snapshots.delete(backup.id)


def test_environment_templates(client: Client, tiny: Image) -> None:
    # Set up a fully configured dev environment.
    with client.sandboxes.create(image=tiny.id, memory=128, env={"EDITOR": "vim"}) as dev:
        # "Install" dependencies, configure tools.
        client.sandboxes.execute(dev.id, "echo vim git nodejs >/root/installed").check()
        client.sandboxes.execute(dev.id, "echo typescript eslint >>/root/installed").check()
        # Snapshot it as a template.
        template = client.sandboxes.snapshot(dev.id, name="dev-environment-template")
    with pytest.raises(SandboxNotFoundError):
        client.sandboxes.get(dev.id)

    # Create new environments from the template, with other resources.
    with client.snapshots.restore(
        template.id, name="new-dev-environment", cpus=2, memory=192, wait_for_ready=True
    ) as new:
        assert (new.name, new.source_snapshot_id) == ("new-dev-environment", template.id)
        assert (new.cpus, new.memory, new.storage) == (2, 192, template.storage)
        assert new.image_id == tiny.id
        said = new.execute("cat /root/installed; echo $EDITOR; nproc").check().stdout_text
        assert said == "vim git nodejs\ntypescript eslint\nvim\n2\n"
    client.snapshots.delete(template.id)


async def test_experiment_branching(client: Client, module_box: Sandbox) -> None:
    async with AsyncClient(client.address) as asking:
        # Base experiment setup, and its state.
        experiment = module_box.id
        await asking.sandboxes.execute(
            experiment, "echo torch numpy >/root/base; rm -f /root/result"
        )
        base_state = await asking.sandboxes.snapshot(experiment, name="experiment-base")

        async def branch(letter: str, approach: int) -> str:
            async with await asking.snapshots.restore(
                base_state.id, name=f"experiment-branch-{letter}"
            ) as sandbox:
                trained = await sandbox.execute(
                    f"cat /root/base; echo approach {approach} >/root/result; cat /root/result"
                )
                return trained.check().stdout_text

        results = await asyncio.gather(branch("a", 1), branch("b", 2))
        assert list(results) == ["torch numpy\napproach 1\n", "torch numpy\napproach 2\n"]
        # Neither touched what both began from.
        assert (await asking.sandboxes.execute(experiment, "cat /root/result")).exit_code == 1
        await asking.snapshots.delete(base_state.id)


async def test_parallel_clones_for_scale(client: Client, module_box: Sandbox) -> None:
    tasks = ["data1.csv", "data2.csv", "data3.csv", "data4.csv"]
    async with AsyncClient(client.address) as asking:
        # A configured base.
        base = await asking.sandboxes.get(module_box.id)
        await base.execute("echo 'echo processed $1 on $(cat /root/id)' >/root/process.sh; sync")
        await base.execute("echo base >/root/id")

        # Four clones of it, asked for at once.
        results = await asyncio.gather(
            *(
                asking.sandboxes.clone(base.id, name=f"worker-{number}", wait_for_ready=True)
                for number in range(len(tasks))
            )
        )
        clones = [result.sandbox for result in results]
        assert [clone.name for clone in clones] == [f"worker-{n}" for n in range(4)]
        assert all(clone.ready for clone in clones)
        assert len({clone.id for clone in clones} | {base.id}) == 5
        assert len({result.snapshot.id for result in results}) == 4
        for clone, result in zip(clones, results, strict=True):
            assert result.snapshot.source_sandbox_id == base.id
            assert result.snapshot.consistency is SnapshotLevel.MEMORY
            assert clone.source_snapshot_id == result.snapshot.id
            assert (clone.cpus, clone.memory, clone.storage) == (
                base.cpus, base.memory, base.storage,
            )  # fmt: skip

        # Parallel processing on each.
        done = await asyncio.gather(
            *(
                asking.sandboxes.execute(clone.id, ["sh", "process.sh", task])
                for clone, task in zip(clones, tasks, strict=True)
            )
        )
        assert [one.stdout_text for one in done] == [f"processed {t} on base\n" for t in tasks]

        # Clean up.
        await asyncio.gather(*(asking.sandboxes.delete(clone.id) for clone in clones))
        await asyncio.gather(*(asking.snapshots.delete(one.snapshot.id) for one in results))
        assert (await base.execute("cat /root/id")).stdout == b"base\n"


def test_clone_options(client: Client, module_box: Sandbox) -> None:
    result = client.sandboxes.clone(
        module_box.id,
        name="my-cloned-sandbox",
        snapshot_name="clone-backup-1",
        cpus=2,
        memory=192,
        env={"ROLE": "copy"},
        wait_for_ready=False,
    )
    with result.sandbox as clone:
        assert (clone.name, clone.state, clone.ready) == ("my-cloned-sandbox", "running", False)
        assert (clone.cpus, clone.memory, clone.storage) == (2, 192, module_box.storage)
        assert clone.env == {"ROLE": "copy"}
        assert (result.snapshot.name, result.snapshot.state) == ("clone-backup-1", "ready")
        assert result.snapshot.source_sandbox_name == module_box.name
    client.snapshots.delete("clone-backup-1")


def test_sandboxes_as_context_managers(client: Client, tiny: Image) -> None:
    class OopsError(Exception):
        pass

    def create() -> Sandbox:
        return client.sandboxes.create(image=tiny.id, memory=128, wait_for_ready=False)

    with pytest.raises(OopsError), create() as sandbox:
        raise OopsError
    with pytest.raises(SandboxNotFoundError):
        sandbox.refresh()
    with create() as sandbox:
        sandbox.delete()  # gone already at the block's end: no error


async def test_the_async_faces_context_manager(client: Client, tiny: Image) -> None:
    async with AsyncClient(client.address) as asking:
        create = asking.sandboxes.create
        async with await create(image=tiny.id, memory=128, wait_for_ready=False) as sandbox:
            expires = datetime.now(UTC) + timedelta(hours=1)
            snapshot = await sandbox.snapshot(expires_at=expires)
            assert snapshot.expires_at == expires
            assert await asking.snapshots.list(sandbox=sandbox.id) == [snapshot]
            assert (await asking.snapshots.wait_ready(snapshot.id)) == snapshot
            await asking.snapshots.delete(snapshot.id)
        with pytest.raises(SandboxNotFoundError):
            await sandbox.refresh()
