"""Layers that are written anew hold what they did: judged by qemu-img and qemu-io alone."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratabox.storage.model.errors import CorruptError, DeniedError
from stratabox.storage.qcow2 import comparing, empty
from stratabox.storage.qcow2.comparing import compare
from stratabox.storage.qcow2.rewrite import Rewrite, open_all
from support import disks

CLUSTER = 1 << 16
MIB = 1 << 20


@dataclass
class Chain:
    """Layers in a folder, made by our own `empty` and filled by QEMU."""

    folder: Path
    sizes: list[int] = field(default_factory=list)

    def path(self, number: int) -> Path:
        return self.folder / f"layer{number}.qcow2"

    def add(self, size: int, commands: Sequence[str] = ()) -> None:
        number = len(self.sizes)
        below = self.path(number - 1).name if number else None
        empty.create(self.path(number), size, below)
        self.sizes.append(size)
        if commands:
            arguments = [each for line in commands for each in ("-c", line)]
            done = subprocess.run(
                ["qemu-io", "-f", "qcow2", *arguments, self.path(number)],
                capture_output=True, check=True,
            )  # fmt: skip
            assert b"error" not in done.stdout.lower() + done.stderr.lower(), done

    def rewrite(
        self, top: int, base: int | None, target: Path, *, compress: bool = False
    ) -> Rewrite:
        """Write layers `top` down to `base`, which is not one of them, anew."""
        numbers = range(top, -1 if base is None else base, -1)
        sources = open_all([(self.path(each), self.sizes[each]) for each in numbers])
        below = None if base is None else self.path(base).name
        with Rewrite(sources, target, backing_name=below, compress=compress) as rewrite:
            assert rewrite.run(lambda _: True)
            rewrite.finish()
        old = [self.path(each) for each in numbers]
        assert compare(target, old, lambda: True, on_base=base is not None)
        return rewrite


def content(path: Path) -> str:
    """SHA-256 of the disk, with all that it stands on, as qemu-img sees it."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
        return disks.digest(raw)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


WRITES = st.lists(
    st.tuples(
        st.sampled_from(["write -P {n}", "write -z", "write -z -u", "discard"]),
        st.integers(0, 90),
        st.integers(1, 9),
    ),
    max_size=5,
)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(layers=st.lists(WRITES, min_size=2, max_size=5), data=st.data(), compress=st.booleans())
def test_any_part_of_any_chain_holds_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    layers: list[list[tuple[str, int, int]]],
    data: st.DataObject,
    compress: bool,
) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        chain = Chain(Path(folder))
        # The end of each disk lies within a cluster, and each is at least as large as before.
        size = 5 * MIB + 512
        for number, writes in enumerate(layers):
            commands = [
                f"{how.format(n=number * 9 + length)} {at * 52224} {length * 24576}"
                for how, at, length in writes
            ]
            chain.add(size, commands)
            size += data.draw(st.sampled_from([0, 0, 512, 3 * CLUSTER + 1024]))
        top = data.draw(st.integers(0, len(layers) - 1))
        base = data.draw(st.none() | st.integers(0, top - 1)) if top else None
        before = content(chain.path(top)), disks.digest(chain.path(top))
        target = chain.folder / "new.qcow2"
        chain.rewrite(top, base, target, compress=compress)
        assert (content(target), disks.digest(chain.path(top))) == before
        # And once more, from what it has become.
        chain.sizes.append(chain.sizes[top])
        target.rename(chain.path(len(chain.sizes) - 1))
        again = chain.folder / "again.qcow2"
        sources = open_all([(chain.path(len(chain.sizes) - 1), chain.sizes[top])])
        below = None if base is None else chain.path(base).name
        with Rewrite(sources, again, backing_name=below) as rewrite:
            assert rewrite.run(lambda _: True)
            rewrite.finish()
        assert content(again) == before[0]


def test_what_compresses_takes_less_and_what_does_not_stays(chain: Chain) -> None:
    chain.add(64 * MIB)
    noise = chain.folder / "noise"
    noise.write_bytes(os.urandom(MIB))
    chain.add(64 * MIB, ["write -P 7 0 8M", "write -P 0 8M 1M", f"write -s {noise} 16M 1M"])
    target = chain.folder / "new.qcow2"
    rewrite = chain.rewrite(1, 0, target, compress=True)
    assert rewrite.compressed
    assert MIB < target.stat().st_blocks * 512 < MIB + 8 * CLUSTER
    assert rewrite.done == rewrite.total == 10 * MIB
    assert target.stat().st_mode & 0o777 == 0o400
    assert content(target) == content(chain.path(1))


def test_it_stops_between_portions_and_goes_on(chain: Chain) -> None:
    chain.add(64 * MIB, ["write -P 1 0 8M"])
    chain.add(64 * MIB, ["write -P 2 4M 8M"])
    target = chain.folder / "new.qcow2"
    sources = open_all([(chain.path(each), 64 * MIB) for each in (1, 0)])
    with Rewrite(sources, target, backing_name=None) as rewrite:
        assert rewrite.total == 12 * MIB
        for done in range(1, 12):
            assert not rewrite.run(lambda _: False)
            assert rewrite.done == done * MIB
        assert rewrite.run(lambda _: True)
        rewrite.finish()
    assert content(target) == content(chain.path(1))


def test_what_was_not_finished_is_gone(chain: Chain) -> None:
    chain.add(64 * MIB, ["write -P 1 0 8M"])
    target = chain.folder / "new.qcow2"
    with Rewrite(open_all([(chain.path(0), 64 * MIB)]), target, backing_name=None) as rewrite:
        assert not rewrite.run(lambda _: False)
        assert target.exists()
    assert not target.exists()


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=4096",
        "compat=0.10",
        "extended_l2=on",
        "data_file={}/data,data_file_raw=on",
        "refcount_bits=8",
        "encrypt.format=aes,encrypt.key-secret=key",  # luks times the CPU, which can fail
    ],
)
def test_what_is_not_ours_is_refused(chain: Chain, options: str) -> None:
    subprocess.run(
        [
            "qemu-img", "create", "-q", "--object", "secret,id=key,data=abc", "-f", "qcow2",
            "-o", options.format(chain.folder), chain.path(0), "8M",
        ],
        check=True,
    )  # fmt: skip
    with pytest.raises(DeniedError) as raised:
        open_all([(chain.path(0), 8 * MIB)])
    assert raised.value.reason == "LAYER_UNFIT"


def test_other_sizes_than_recorded_are_refused(chain: Chain) -> None:
    chain.add(8 * MIB)
    with pytest.raises(DeniedError, match="bytes, not"):
        open_all([(chain.path(0), 9 * MIB)])


def test_a_layer_that_is_smaller_than_what_it_stands_on_is_refused(chain: Chain) -> None:
    chain.add(8 * MIB)
    chain.add(4 * MIB)
    sources = open_all([(chain.path(1), 4 * MIB), (chain.path(0), 8 * MIB)])
    with pytest.raises(DeniedError, match="is smaller than"):
        Rewrite(sources, chain.folder / "new.qcow2", backing_name=None)
    assert not (chain.folder / "new.qcow2").exists()


def test_garbage_in_a_table_is_refused(chain: Chain) -> None:
    chain.add(8 * MIB, ["write -P 1 0 64k"])
    with chain.path(0).open("r+b") as file:
        file.seek(4 * CLUSTER)  # the first cluster behind those of `empty`: its L2 table
        file.write(b"\x3f" * 8)
    sources = open_all([(chain.path(0), 8 * MIB)])
    with pytest.raises(DeniedError, match="an entry of its L2 table"):
        Rewrite(sources, chain.folder / "new.qcow2", backing_name=None)


def test_a_comparison_sees_a_flipped_byte_and_a_lost_zero(chain: Chain) -> None:
    chain.add(8 * MIB, ["write -P 9 0 8M"])
    chain.add(8 * MIB, ["write -P 1 0 64k", "write -z 1M 64k"])
    for number, commands in enumerate(
        (["write -P 1 0 64k"], ["write -P 2 0 64k", "write -z 1M 64k"])
    ):
        other = Chain(chain.folder / str(number))
        other.folder.mkdir()
        other.add(8 * MIB, commands)
        with pytest.raises(CorruptError) as raised:
            compare(other.path(0), [chain.path(1)], lambda: True, on_base=True)
        assert raised.value.reason == "LAYER_CORRUPT"
    assert compare(chain.path(1), [chain.path(1)], lambda: True, on_base=True)


@pytest.mark.parametrize("asked", [1, 2])
def test_a_comparison_can_be_given_up(
    chain: Chain, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it begins, and in it: a wait of no length is over before any process is."""
    monkeypatch.setattr(comparing, "_LOOK_SECONDS", 0)
    chain.add(8 * MIB, ["write -P 9 0 8M"])
    answers = iter([True] * (asked - 1) + [False])
    assert not compare(chain.path(0), [chain.path(0)], lambda: next(answers), on_base=True)
    assert next(answers, None) is None


def test_what_lies_behind_the_end_of_a_lower_disk_stays_out(chain: Chain) -> None:
    chain.add(MIB + 512, ["write -P 85 1M 512"])
    chain.add(2 * MIB)
    with chain.path(0).open("r+b") as file:
        data = file.read()
        file.seek(data.index(b"\x55" * 512) + 512)
        file.write(b"\xaa" * 512)  # QEMU reads the disk to its end, and zeros behind it
    before = content(chain.path(1))
    target = chain.folder / "new.qcow2"
    chain.rewrite(1, None, target)
    assert content(target) == before
