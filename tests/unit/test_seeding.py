"""Seeds: what is on them, who needs them, and what is told of cloud-init."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import pycdlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratabox.daemon.hypervisor.guest.cloud_init import explain
from stratabox.daemon.lifecycle.seeding import disk, wishes
from stratabox.daemon.lifecycle.transfers import portable
from stratabox.storage.catalog import sandboxes, seeds, snapshots
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.files.store import Store
from stratabox.storage.files.transfer import manifest, strict
from stratabox.storage.files.transfer.fields import Fields
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.ids import Sha256
from stratabox.storage.model.states import SandboxState
from support.records import Maker

SEED = Sha256("5" * 64)


def on_it(volume: bytes, name: str) -> bytes:
    """A file of a seed, as a guest reads it."""
    opened = pycdlib.PyCdlib()
    opened.open_fp(io.BytesIO(volume))
    try:
        content = io.BytesIO()
        opened.get_file_from_iso_fp(content, rr_path=f"/{name}")
        again = io.BytesIO()
        opened.get_file_from_iso_fp(again, joliet_path=f"/{name}")
        assert content.getvalue() == again.getvalue()
        return content.getvalue()
    finally:
        opened.close()


def test_a_seed_says_who_the_guest_is_and_keeps_user_data_as_it_came(tmp_path: Path) -> None:
    user_data = b"#!/bin/sh\n\0\xff" + bytes(range(256)) * 300
    volume = disk.seed(instance="some-id", hostname="box", user_data=user_data, keys=["a b"])
    assert on_it(volume, "user-data") == user_data
    assert json.loads(on_it(volume, "meta-data")) == {
        "instance-id": "some-id", "local-hostname": "box", "public-keys": ["a b"],
    }  # fmt: skip
    (tmp_path / "seed").write_bytes(volume)
    found = subprocess.run(
        ["blkid", "-o", "value", "-s", "LABEL", "-s", "TYPE", tmp_path / "seed"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == ["cidata", "iso9660"]
    # The card's address is not in it: copies get another one.
    assert b"52:54" not in on_it(volume, "network-config")


def test_a_seed_brings_our_files_and_a_script_that_a_shell_can_read(tmp_path: Path) -> None:
    hook = on_it(disk.seed(instance="i", hostname="box"), "vendor-data")
    head, _, packed = hook.partition(b"#FILES\n")
    assert head.startswith(b"#cloud-boothook\n#!/bin/sh\nsum=")
    with tarfile.open(fileobj=io.BytesIO(b64decode(packed))) as archive:
        modes = {entry.name: entry.mode for entry in archive}
    assert modes["usr/libexec/stratabox/guest-agent"] == 0o755
    assert modes["etc/systemd/system/qemu-guest-agent.service.d/stratabox.conf"] == 0o644
    script = tmp_path / "hook"
    script.write_bytes(hook)
    subprocess.run(["sh", "-n", script], check=True)


def test_a_seed_without_user_data_has_some_that_does_nothing() -> None:
    user_data = on_it(disk.seed(instance="i", hostname="box"), "user-data")
    wishes.check_user_data(user_data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"#cloud-config\n",
        b"#cloud-config\r\npackages: [a]\r\n",
        b"#cloud-config\n" + b"a: &x [1, 2]\nb: *x\n",
        b"#!/bin/sh\nexit 0\n",
        b"## template: jinja\n#cloud-config\na: {{ v1.x }}\n",
        b"#include\nhttp://localhost/\n",
        b"Content-Type: multipart/mixed; boundary=x\n\n--x--\n",
        b"\x1f\x8b\x08",
    ],
)
def test_user_data_that_cloud_init_reads_passes(data: bytes) -> None:
    wishes.check_user_data(data)


@given(st.binary(max_size=200))
def test_any_user_data_passes_or_is_refused_with_its_field(data: bytes) -> None:
    for each in (data, b"#cloud-config\n" + data):
        reason = "INVALID_USER_DATA"
        try:
            wishes.check_user_data(each)
        except InvalidArgumentError as error:
            reason = error.reason
        assert reason == "INVALID_USER_DATA"


def test_keys() -> None:
    blob = "A" * 68
    wishes.check_keys([f"ssh-ed25519 {blob}", f"sk-ssh-ed25519@openssh.com {blob}== me@box, ü"])
    for bad in (
        "",
        "ssh-rsa",
        f"ssh-rsa {blob}\nssh-rsa {blob}",
        f"ssh-rsa {blob} a\0b",
        "x" * 20000,
    ):
        with pytest.raises(InvalidArgumentError):
            wishes.check_keys([bad])
    with pytest.raises(InvalidArgumentError):
        wishes.check_keys([f"ssh-rsa {blob}"] * (wishes.MAX_KEYS + 1))


def test_who_needs_a_seed(catalog: Catalog, store: Store, maker: Maker, tmp_path: Path) -> None:
    source = tmp_path / "seed"
    source.write_bytes(b"a volume")
    with catalog.transaction() as tx:
        seed = store.put_blob(source)
        (layer,) = maker.chain(tx, 1)
        machine = maker.machine(seed=seed)
        sandbox = sandboxes.insert(tx, maker.sandbox(layer, machine=machine))
        snapshot = snapshots.insert(tx, maker.snapshot(layer, machine=machine))
        snapshots.insert(tx, maker.snapshot(layer))
    assert store.layout.blob(seed).exists()
    with catalog.transaction() as tx:
        assert seeds.of_snapshots(tx) == {seed}
        assert not seeds.is_needed(tx, SEED)
        plan = tx.rows(
            "EXPLAIN QUERY PLAN SELECT 1 FROM snapshots WHERE json_extract(machine, '$.seed') = 'x'"
        )
        assert "snapshots_by_seed" in plan[0]["detail"]
        for state in (SandboxState.TERMINATING, SandboxState.TERMINATED):
            sandboxes.change(tx, sandbox.id, state=state, disks=())
    store.drop_seed(catalog, seed)
    # One that was taken while a sweep had looked at the snapshots already.
    store.sweep_blobs(catalog, (), of_snapshots=set())
    assert store.layout.blob(seed).exists(), "its snapshot goes on with it"
    with catalog.transaction() as tx:
        snapshots.delete(tx, snapshot.id)
    store.drop_seed(catalog, seed)
    assert not store.layout.blob(seed).exists()


@pytest.mark.parametrize("memory", [False, True])
def test_an_archive_has_the_seed_where_saved_memory_knows_it(maker: Maker, *, memory: bool) -> None:
    record = maker.snapshot(machine=maker.machine(seed=SEED, channel=True))
    packed = portable.pack_snapshot(record, {}, env=False, memory=memory)
    text = manifest.dump(manifest.Manifest(layers=(), members=(), snapshot=packed))
    fields = json.loads(text)["snapshot"]["machine"]
    assert fields.get("seed") == (SEED if memory else None)
    assert strict._machine(Fields(fields, "machine")) == replace(
        record.machine, seed=SEED if memory else None
    )
    needed = manifest.needed_blobs(manifest.Manifest(layers=(), members=(), snapshot=packed))
    assert (SEED in needed) == memory


def test_what_cloud_init_says_is_told_in_words() -> None:
    good = json.dumps({"v1": {"datasource": "x", "errors": []}})
    assert explain(good) == ""
    bad = json.dumps({"v1": {"errors": ["('scripts_user', RuntimeError('1 failed'))"]}}, indent=1)
    assert explain(bad) == "('scripts_user', RuntimeError('1 failed'))"
    log = "2026-01-01 00:00:00,000 - util.py[WARNING]: Failed loading yaml blob. Invalid format"
    assert explain(f"{good}\n{log}\n") == "Failed loading yaml blob. Invalid format"
    for nonsense in ("", "{", "[]", '{"v1": 3}', "{" * 100_000, '{"v1": {"errors": "all"}}'):
        assert explain(nonsense)
    assert len(explain(json.dumps({"v1": {"errors": ["x" * 100_000]}}))) <= 600
