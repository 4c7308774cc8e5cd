"""Files of RAM: what was written is read again, in any chain; what is damaged is refused."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratabox.storage.files.memory import chain as chains
from stratabox.storage.files.memory.format import PAGE, ZEROS, RamFile, header, read_header, verify
from stratabox.storage.files.memory.sealed import assemble, is_sealed, read_state, write_state
from stratabox.storage.files.memory.writer import RamWriter, write
from stratabox.storage.model.errors import CorruptError
from stratabox.storage.model.ids import Sha256, mint

PAGES = 24
RAM = PAGES * PAGE

# What is written to one file, in order: (first page, the byte that each page is filled with).
pieces = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.lists(st.integers(0, 3), min_size=1, max_size=6)),
    max_size=6,
)


def data(values: Sequence[int]) -> memoryview:
    return memoryview(b"".join(bytes([value]) * PAGE for value in values))


def write_pieces(
    path: Path, id: str, parent: str | None, written: Sequence[tuple[int, Sequence[int]]]
) -> RamFile:
    return write(
        path,
        [(first * PAGE, data(values[: PAGES - first])) for first, values in written],
        id=id,
        parent=parent,
        ram_bytes=RAM,
    )


def content(descriptor: int) -> list[int]:
    try:
        assert is_sealed(descriptor, RAM)
        ram = os.pread(descriptor, RAM, 0)
    finally:
        os.close(descriptor)
    assert all(len(set(ram[at : at + PAGE])) == 1 for at in range(0, RAM, PAGE))
    return list(ram[::PAGE])


@settings(max_examples=60, deadline=None)
@given(generations=st.lists(pieces, min_size=1, max_size=5), seed=st.integers())
def test_any_chain_and_any_merge_of_it_holds_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    generations: list[list[tuple[int, list[int]]]],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    ids: list[str] = []
    states = []
    ram = [0] * PAGES
    for written in generations:
        ids.append(mint())
        parent = ids[-2] if len(ids) > 1 else None
        file = write_pieces(folder / ids[-1], ids[-1], parent, written)
        assert read_header(file.path) == file
        verify(file)
        for first, values in written:
            ram[first : first + len(values)] = values[: PAGES - first]
        states.append(list(ram))

    def check() -> None:
        for id, state in zip(ids, states, strict=True):
            assert content(assemble(chains.read_chain(id, folder.joinpath, RAM))) == state

    check()
    choices = random.Random(seed)
    while len(ids) > 1:
        gone = choices.randrange(len(ids) - 1)
        child, parent_path = folder / ids[gone + 1], folder / ids[gone]
        merged = chains.merge(read_header(child), read_header(parent_path), folder / "merged")
        verify(merged)
        merged.path.rename(child)
        parent_path.unlink()
        del ids[gone], states[gone]
        check()


def test_a_file_is_no_larger_than_what_is_not_zero(tmp_path: Path) -> None:
    file = write_pieces(tmp_path / "ram", mint(), None, [(0, [1, 0, 0, 2]), (9, [0, 0, 0])])
    assert file.own_bytes == 2 * PAGE
    assert file.path.stat().st_size == 3 * PAGE + len(file.table) * 8 + len(file.sums)
    assert file.path.stat().st_mode & 0o777 == 0o400


@pytest.fixture
def file(tmp_path: Path) -> RamFile:
    file = write_pieces(tmp_path / "ram", mint(), None, [(0, [1, 2, 0, 3]), (9, [1, 1])])
    file.path.chmod(0o600)
    return file


@settings(max_examples=300, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, position: float, bit: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "ram"
    file = write_pieces(path, mint(), None, [(0, [1, 2, 0, 3]), (9, [1, 1])])
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(CorruptError) as caught:
        verify(read_header(path))
    assert caught.value.reason == "RAM_CORRUPT"
    assert file.path.name in caught.value.message


@pytest.mark.parametrize("size", [0, 100, PAGE, 3 * PAGE, -1, +1])
def test_another_size_is_refused(file: RamFile, size: int) -> None:
    whole = file.path.stat().st_size
    os.truncate(file.path, size if size > 1 or size == 0 else whole + size)
    with pytest.raises(CorruptError):
        read_header(file.path)


def test_a_file_that_was_not_finished_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with RamWriter(path, id=mint(), parent=None, ram_bytes=RAM) as writer:
        writer.add(0, data([1]))
        with pytest.raises(CorruptError, match="no header"):
            read_header(path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CorruptError, match="missing"):
        read_header(path)


@pytest.mark.parametrize(
    ("runs", "data_pages", "words"),
    [
        ([(0, 0)], 0, "run of 0 pages"),
        ([(PAGES, 1)], 1, "at page 24"),
        ([(PAGES - 1, 2)], 2, "at page 23"),
        ([(0, ZEROS | (PAGES + 1))], 0, "run of 25 pages"),
        ([(0, 1)], 2, "runs of 1 pages and 2"),
        ([(0, 1)] * (4 * PAGES + 1), 0, "impossible"),
    ],
)
def test_a_forged_header_leads_nowhere(
    tmp_path: Path, runs: list[tuple[int, int]], data_pages: int, words: str
) -> None:
    """Its sums are right, so that only the bounds are left to refuse it."""
    path = tmp_path / "ram"
    table = b"".join(number.to_bytes(8, "little") for run in runs for number in run)
    tables = table + bytes(32) * (1 if data_pages else 0)
    first = header(
        id=mint(),
        parent=None,
        ram_bytes=RAM,
        runs=len(runs),
        data_pages=data_pages,
        tables=tables,
    )
    path.write_bytes(first + bytes(PAGE) * data_pages + tables)
    with pytest.raises(CorruptError, match=words):
        read_header(path)


def test_a_chain_that_is_none_is_refused(tmp_path: Path) -> None:
    old, new, stranger = mint(), mint(), mint()
    write_pieces(tmp_path / old, old, None, [(0, [1])])
    write_pieces(tmp_path / new, new, old, [(1, [2])])
    write_pieces(tmp_path / stranger, old, stranger, [])
    with pytest.raises(CorruptError, match="of a RAM of"):
        chains.read_chain(new, tmp_path.joinpath, RAM * 2)
    with pytest.raises(CorruptError, match="says that it is"):
        chains.read_chain(stranger, tmp_path.joinpath, RAM)
    with pytest.raises(CorruptError, match="does not stand on"):
        chains.merge(read_header(tmp_path / old), read_header(tmp_path / new), tmp_path / "merged")
    (tmp_path / old).unlink()
    with pytest.raises(CorruptError, match="missing"):
        chains.read_chain(new, tmp_path.joinpath, RAM)
    own = mint()
    write_pieces(tmp_path / own, own, own, [(0, [1])])
    with pytest.raises(CorruptError, match="own ancestor"):
        chains.read_chain(own, tmp_path.joinpath, RAM)


def test_a_state_is_what_was_saved_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    digest = write_state(path, b"devices")
    descriptor = read_state(path, digest)
    assert os.pread(descriptor, 100, 0) == b"devices"
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    os.close(descriptor)
    path.chmod(0o600)
    for damaged in (b"devicet", b"device", b"devicess", b""):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError) as caught:
            read_state(path, digest)
        assert caught.value.reason == "STATE_CORRUPT"
    path.unlink()
    with pytest.raises(CorruptError, match="missing"):
        read_state(path, Sha256(digest))
