"""Who may have a volume and where, and how a domain has it: rows and words, without any guest."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratabox.client._requests import mount
from stratabox.client.cli.options import parse_size
from stratabox.client.errors import InvalidArgumentError as ClientInvalidArgumentError
from stratabox.daemon.hypervisor import command_line
from stratabox.daemon.hypervisor.machine import ChainLayer, DomainVolume
from stratabox.daemon.lifecycle.common.locks import Locks
from stratabox.daemon.lifecycle.volumes import claims
from stratabox.daemon.lifecycle.volumes.claims import Wish
from stratabox.storage.catalog import attachments, layers, sandboxes, volumes
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.store import Store
from stratabox.storage.files.volumes import grow, make_disk, real_size
from stratabox.storage.model.errors import (
    DeniedError,
    InvalidArgumentError,
    NoSpaceError,
)
from stratabox.storage.model.ids import ImageId, LayerId, SandboxId, VolumeId, mint
from stratabox.storage.model.records import Layer, Machine, Sandbox, Volume
from stratabox.storage.model.states import (
    AttachmentState,
    LayerState,
    SandboxState,
    VolumeState,
)
from stratabox.storage.model.workspaces import DEFAULT_WORKSPACE

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MIB = 1 << 20
ATTACHED = AttachmentState.ATTACHED


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "catalog.db")
    yield opened
    opened.close()


def add_sandbox(catalog: Catalog, name: str) -> Sandbox:
    machine = Machine(
        machine_type="pc-q35-7.2", accelerator="tcg", cpu_model="max", qemu_version="7.2.0",
        firmware={}, mac="52:54:00:00:00:01", volumes=True,
    )  # fmt: skip
    record = Sandbox(
        id=SandboxId(mint()), workspace=DEFAULT_WORKSPACE, name=name,
        state=SandboxState.RUNNING, image=ImageId(mint()), image_name="tiny", cpus=1,
        memory=128, storage=1, machine=machine, created_at=NOW, updated_at=NOW,
    )  # fmt: skip
    with catalog.transaction() as tx:
        return sandboxes.insert(tx, record)


def add_volume(catalog: Catalog, name: str, *, clean: bool = True) -> Volume:
    layer = LayerId(mint())
    with catalog.transaction() as tx:
        layers.insert(
            tx,
            Layer(id=layer, parent=None, state=LayerState.ACTIVE, size=MIB, created_at=NOW),
        )
        return volumes.insert(
            tx,
            Volume(
                id=VolumeId(mint()), workspace=DEFAULT_WORKSPACE, name=name,
                state=VolumeState.READY, size=MIB, layer=layer, filesystem=MIB, clean=clean,
                created_at=NOW, updated_at=NOW,
            ),
        )  # fmt: skip


def claim(
    catalog: Catalog, sandbox: Sandbox, volume: Volume, path: str = "/v", *, read_only: bool = False
) -> None:
    with catalog.transaction() as tx:
        wish = Wish(volume=volume.id, path=path, read_only=read_only)
        claims.claim(tx, sandbox, wish, ATTACHED)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(holders=st.lists(st.booleans(), max_size=5), wanted=st.booleans())
def test_one_writer_or_any_number_of_readers(
    catalog: Catalog, holders: list[bool], wanted: bool
) -> None:
    """Whoever comes in whatever order, what is let in fits what is there; True: to read."""
    volume = add_volume(catalog, mint())
    inside: list[bool] = []
    for number, read_only in enumerate([*holders, wanted]):
        box = add_sandbox(catalog, f"box {number}")
        if not inside or (read_only and all(inside)):
            claim(catalog, box, volume, read_only=read_only)
            inside.append(read_only)
        else:
            with pytest.raises(DeniedError, match=r"'box \d'") as refused:
                claim(catalog, box, volume, read_only=read_only)
            assert refused.value.reason == "VOLUME_IN_USE"


def test_the_schema_itself_allows_one_writer_only(catalog: Catalog) -> None:
    volume = add_volume(catalog, "v")
    one, other = add_sandbox(catalog, "one"), add_sandbox(catalog, "other")
    claim(catalog, one, volume)
    with catalog.transaction() as tx:
        (attachment,) = attachments.of_sandbox(tx, one.id)
    with pytest.raises(Exception, match="UNIQUE"), catalog.transaction() as tx:
        attachments.insert(tx, replace(attachment, sandbox=other.id))


def test_slots_and_paths_are_given_once(catalog: Catalog) -> None:
    box = add_sandbox(catalog, "box")
    made = [add_volume(catalog, f"v{number}") for number in range(command_line.MAX_VOLUMES + 1)]
    for number, volume in enumerate(made[:-1]):
        claim(catalog, box, volume, f"/v{number}")
    with pytest.raises(InvalidArgumentError, match="at most 16"):
        claim(catalog, box, made[-1], "/last")
    with catalog.transaction() as tx:
        assert [each.slot for each in attachments.of_sandbox(tx, box.id)] == [*range(16)]
        attachments.delete(tx, box.id, made[3].id)
    with pytest.raises(InvalidArgumentError, match="has volume 'v4' at /v4"):
        claim(catalog, box, made[-1], "/v4")
    claim(catalog, box, made[-1], "/last")
    with catalog.transaction() as tx:
        found = {each.path: each.slot for each in attachments.of_sandbox(tx, box.id)}
    assert found["/last"] == 3


def test_what_needs_recovery_is_not_given_to_readers(catalog: Catalog) -> None:
    box, volume = add_sandbox(catalog, "box"), add_volume(catalog, "v", clean=False)
    with pytest.raises(DeniedError) as refused:
        claim(catalog, box, volume, read_only=True)
    assert refused.value.reason == "VOLUME_NOT_CLEAN"
    claim(catalog, box, volume)


@pytest.mark.parametrize(
    ("state", "left"),
    [
        (SandboxState.STOPPED, {"a": ATTACHED, "b": ATTACHED}),
        (SandboxState.FAILED, {"a": ATTACHED, "b": ATTACHED}),
        (SandboxState.PAUSED, {"a": ATTACHED, "b": AttachmentState.ATTACHING,
                               "c": AttachmentState.DETACHING}),
        (SandboxState.TERMINATING, {"a": ATTACHED, "b": AttachmentState.ATTACHING,
                                    "c": AttachmentState.DETACHING}),
    ],
)  # fmt: skip
def test_a_sandbox_without_a_process_has_claims_and_nothing_half_done(
    catalog: Catalog, state: SandboxState, left: dict[str, AttachmentState]
) -> None:
    box = add_sandbox(catalog, "box")
    for name, attachment in zip("abc", AttachmentState, strict=True):
        made = add_volume(catalog, name)
        claim(catalog, box, made, f"/{name}")
        with catalog.transaction() as tx:
            attachments.change(tx, box.id, made.id, attachment)
    states = dict(zip("abc", (ATTACHED, AttachmentState.ATTACHING, AttachmentState.DETACHING),
                      strict=True))  # fmt: skip
    with catalog.transaction() as tx:
        for each in attachments.of_sandbox(tx, box.id):
            attachments.change(tx, box.id, each.volume, states[each.volume_name])
        changed = sandboxes.change(tx, box.id, state=state)
        assert {each.volume_name: each.state for each in changed.volumes} == left
        assert changed.volumes == attachments.of_sandbox(tx, box.id)
        if state is SandboxState.TERMINATING:
            assert sandboxes.change(tx, box.id, state=SandboxState.TERMINATED).volumes == ()


@given(
    st.text("ab./ \n\\\x00é", max_size=12).map(lambda text: f"/{text}")
    | st.sampled_from(["/etc", "/proc/1", "/dev/shm", "//", "/usr/", "/mnt//x/", "/a/./b"])
)
def test_a_path_is_plain_or_refused(path: str) -> None:
    try:
        plain = claims.check_path(path)
    except InvalidArgumentError:
        return
    assert plain.startswith("/")
    assert plain == claims.check_path(plain)
    assert not {"", ".", ".."} & set(plain[1:].split("/"))
    assert "\n" not in plain
    assert plain not in ("/", "/etc", "/usr", "/proc", "/dev", "/sys")


def test_how_a_domain_has_a_volume() -> None:
    chain = [ChainLayer(id=LayerId(mint()), path=Path(f"/l/{number}")) for number in range(2)]

    class Files:
        def layer(self, layer: ChainLayer, *, active: bool) -> str:
            return f"{'rw' if active else 'ro'}:{layer.path}"

    def words(volume: DomainVolume, known: set[str]) -> list[dict[str, object]]:
        arguments = command_line.volume_arguments(volume, Files(), known)  # type: ignore[arg-type]
        pairs = (
            itertools.batched(arguments, 2)
            if hasattr(itertools, "batched")
            else zip(arguments[::2], arguments[1::2], strict=True)
        )
        return [json.loads(value) for _, value in pairs]

    writer = DomainVolume(slot=3, serial="s" * 20, chain=chain, read_only=False)
    below, top, device = words(writer, set())
    assert (below["read-only"], top["read-only"]) == (True, False)
    assert (device["scsi-id"], device["lun"], device["id"]) == (3, 0, "vol3")
    assert (device["drive"], device["serial"], device["werror"]) == (
        chain[0].node,
        "s" * 20,
        "enospc",
    )
    _, top, _ = words(replace(writer, read_only=True), set())
    assert top["read-only"] is True
    assert str(top["file"]["filename"]).startswith("ro:")  # type: ignore[index]
    assert len(words(replace(writer, chain=chain[:1]), {chain[0].node})) == 1, (
        "what is there is shared"
    )
    empty, device = words(replace(writer, chain=()), set())
    assert (empty["driver"], empty["node-name"]) == ("null-co", device["drive"])
    assert empty["read-zeroes"] is True
    for wrong in (replace(writer, slot=16), replace(writer, serial="s" * 21)):
        with pytest.raises(InvalidArgumentError):
            words(wrong, set())


def test_a_disk_is_formatted_and_takes_little(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    Store(layout)
    for size in (MIB, 100 << 30):
        layer = LayerId(mint())
        assert make_disk(layout, layer, size) == size
        path = layout.layer(layer)
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.stat().st_blocks * 512 < MIB + size // 4096
        assert real_size(layout, layer) == size
        grow(layout, layer, 2 * size)
        grow(layout, layer, size)
        assert real_size(layout, layer) == 2 * size, "never smaller again"
    assert list(layout.work.iterdir()) == []


def test_nothing_is_left_of_a_disk_that_could_not_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    Store(layout)
    monkeypatch.setattr("stratabox.storage.failpoints._armed", {"volume.formatted": "nospace"})
    with pytest.raises(NoSpaceError):
        make_disk(layout, LayerId(mint()), MIB)
    assert list(layout.work.iterdir()) == list(layout.layers.iterdir()) == []


async def test_locks_are_by_id_and_go_with_their_last_user() -> None:
    locks, order = Locks(), []

    async def work(name: str, *ids: str) -> None:
        async with locks.hold(*ids):
            order.append(f"{name} in")
            await asyncio.sleep(0)
            order.append(f"{name} out")

    await asyncio.gather(work("1", "a", "b"), work("2", "b", "a"), work("3", "b"), work("4", "c"))
    alone = [each for each in order if each[0] in "123"]
    assert [each.split()[1] for each in alone] == ["in", "out"] * 3
    assert order.index("4 in") < order.index("1 out"), "another id is nobody's business"
    assert locks._locks == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:/data", ("data", "/data", False)),
        ("data:/data:ro", ("data", "/data", True)),
        ("a:b:/c d/:ro", ("a:b", "/c d/", True)),
    ],
)
def test_a_volume_as_text(text: str, expected: tuple[str, str, bool]) -> None:
    read = mount(text)
    assert (read.volume, read.path, read.read_only) == expected


@pytest.mark.parametrize("text", ["", "data", ":/x", "data:x", "data:ro"])
def test_what_is_no_volume(text: str) -> None:
    with pytest.raises(ClientInvalidArgumentError):
        mount(text)


def test_sizes_as_text() -> None:
    assert [parse_size(each) for each in ("1048576", "1MiB", "2G", "3TB", "4Ki")] == [
        MIB, MIB, 2 << 30, 3 << 40, 4096,
    ]  # fmt: skip
    for wrong in ("", "1.5GiB", "-1", "1PiB", "GiB", "1 MiB"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(wrong)
