"""Files of RAM: what was written is read again, in any chain; what is damaged is refused."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import struct
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from stratabox.storage.files.memory import chain as chains
from stratabox.storage.files.memory.chain import OpenChain, put_in_place
from stratabox.storage.files.memory.format import (
    CHUNK,
    PAGE,
    ZEROS,
    RamFile,
    header,
    read_header,
    verify,
)
from stratabox.storage.files.memory.packing import unpack
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


def assembled(folder: Path, id: str, *, verify: bool = False, ram: int = RAM) -> int:
    with OpenChain(id, folder.joinpath, ram) as chain:
        return assemble(chain, verify=verify)


def write_version_1(
    path: Path, id: str, parent: str | None, written: Sequence[tuple[int, Sequence[int]]]
) -> RamFile:
    """As builds before 2 wrote it: each MiB of pages as it is, with its sum."""
    runs, stored = b"", b""
    for first, values in written:
        stored += bytes(data(values[: PAGES - first]))
        runs += struct.pack("<QQ", first, len(values[: PAGES - first]))
    sums = b"".join(
        hashlib.sha256(stored[at : at + (1 << 20)]).digest()
        for at in range(0, len(stored), 1 << 20)
    )
    page = struct.pack(
        "<8sIIQ16s16sQQQ32s", b"SBXRAM\r\n", 1, PAGE, RAM, uuid.UUID(id).bytes,
        uuid.UUID(parent).bytes if parent else bytes(16), len(written), len(stored) // PAGE,
        len(runs + sums), hashlib.sha256(runs + sums).digest(),
    ).ljust(PAGE - 32, b"\0")  # fmt: skip
    path.write_bytes(page + hashlib.sha256(page).digest() + stored + runs + sums)
    path.chmod(0o400)
    return read_header(path)


def content(descriptor: int) -> list[int]:
    try:
        assert is_sealed(descriptor, RAM)
        ram = os.pread(descriptor, RAM, 0)
    finally:
        os.close(descriptor)
    assert all(len(set(ram[at : at + PAGE])) == 1 for at in range(0, RAM, PAGE))
    return list(ram[::PAGE])


@settings(max_examples=60, deadline=None)
@given(
    generations=st.lists(st.tuples(pieces, st.booleans()), min_size=1, max_size=5),
    seed=st.integers(),
)
def test_any_chain_and_any_merge_of_it_holds_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    generations: list[tuple[list[tuple[int, list[int]]], bool]],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    ids: list[str] = []
    states = []
    ram = [0] * PAGES
    for written, old in generations:
        ids.append(mint())
        parent = ids[-2] if len(ids) > 1 else None
        write_any = write_version_1 if old else write_pieces
        file = write_any(folder / ids[-1], ids[-1], parent, written)
        assert read_header(file.path) == file
        verify(file)
        for first, values in written:
            ram[first : first + len(values)] = values[: PAGES - first]
        states.append(list(ram))

    def check() -> None:
        for id, state in zip(ids, states, strict=True):
            for thorough in (False, True):
                assert content(assembled(folder, id, verify=thorough)) == state

    check()
    choices = random.Random(seed)
    while len(ids) > 1:
        # Some neighbours go, into the one above them.
        child = choices.randrange(1, len(ids))
        gone = ids[choices.randrange(child) : child]
        below = ids.index(gone[0]) - 1
        with OpenChain(ids[child], folder.joinpath, RAM) as chain:
            merged = chains.merge(
                chain, folder / "merged", until=ids[below] if below >= 0 else None
            )
        assert merged is not None
        verify(merged)
        put_in_place(merged.path, folder / ids[child])
        for id in gone:
            (folder / id).unlink()
            del states[ids.index(id)]
            ids.remove(id)
        check()


def test_a_file_is_no_larger_than_what_it_takes(tmp_path: Path) -> None:
    noise = [random.Random(number).randbytes(PAGE) for number in range(70)]
    id = mint()
    file = write(
        tmp_path / id,
        [
            (0, memoryview(noise[0] + bytes(2 * PAGE) + b"".join(noise[1:]))),
            (100 * PAGE, data([7] * 100)),
            (300 * PAGE, data([0] * 64)),
        ],
        id=id,
        parent=None,
        ram_bytes=512 * PAGE,
    )
    assert file.data_pages == 170
    # Random pages as they are, and next to nothing for the others.
    assert 70 * PAGE <= file.own_bytes < 72 * PAGE
    assert file.stored[0] == CHUNK
    tables = (len(file.table) + len(file.stored) // 2 + 1) * 8 + len(file.sums)
    assert file.path.stat().st_size <= PAGE + file.own_bytes + tables
    assert file.path.stat().st_mode & 0o777 == 0o400
    descriptor = assembled(tmp_path, id, ram=512 * PAGE)
    ram = os.pread(descriptor, 512 * PAGE, 0)
    os.close(descriptor)
    assert ram[:PAGE] + ram[3 * PAGE : 72 * PAGE] == b"".join(noise)
    assert ram[100 * PAGE : 200 * PAGE] == b"\7" * 100 * PAGE
    assert set(ram[PAGE : 3 * PAGE] + ram[72 * PAGE : 100 * PAGE] + ram[200 * PAGE :]) == {0}


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
    id = mint()
    path = tmp_path_factory.mktemp("flip") / id
    noise = memoryview(random.Random(position).randbytes(3 * PAGE))
    file = write(
        path, [(0, data([1, 2, 0, 3])), (9 * PAGE, noise)], id=id, parent=None, ram_bytes=RAM
    )
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(CorruptError) as caught:
        verify(read_header(path))
    assert caught.value.reason == "RAM_CORRUPT"
    assert file.path.name in caught.value.message
    with pytest.raises(CorruptError):
        os.close(assembled(path.parent, path.name, verify=True))


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


def forged(
    path: Path,
    *,
    runs: Sequence[tuple[int, int]],
    data_pages: int,
    stored: Sequence[bytes],
    chunk_bytes: int = CHUNK,
    sizes: Sequence[int] | None = None,
) -> Path:
    """A file whose sums are all right, so that only the bounds are left to refuse it."""
    table = b"".join(number.to_bytes(8, "little") for run in runs for number in run)
    table += b"".join(size.to_bytes(4, "little") for size in sizes or map(len, stored))
    tables = table + b"".join(hashlib.sha256(each).digest() for each in stored)
    first = header(
        id=mint(),
        parent=None,
        ram_bytes=RAM,
        runs=len(runs),
        data_pages=data_pages,
        stored_bytes=sum(map(len, stored)),
        tables=tables,
        chunk_bytes=chunk_bytes,
    )
    path.write_bytes(first + b"".join(stored) + tables)
    return path


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
    stored = [bytes(PAGE) * data_pages] if data_pages else []
    path = forged(tmp_path / "ram", runs=runs, data_pages=data_pages, stored=stored)
    with pytest.raises(CorruptError, match=words):
        read_header(path)


FRAME = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(2 * PAGE))


@pytest.mark.parametrize(
    ("stored", "sizes", "chunk_bytes", "words"),
    [
        ([bytes(2 * PAGE + 1)], None, CHUNK, "tables of an impossible size"),
        ([FRAME], [0], CHUNK, "chunks of an impossible size"),
        ([FRAME], [len(FRAME) + 1], CHUNK, "chunks of an impossible size"),
        ([FRAME, FRAME], None, CHUNK, "tables of an impossible size"),
        ([bytes(PAGE + 1), bytes(PAGE - 1)], None, PAGE, "chunks of an impossible size"),
        ([FRAME], None, 0, "has chunks of 0 bytes"),
        ([FRAME], None, PAGE + 1, "has chunks of 4097 bytes"),
        ([FRAME], None, 1 << 31, "has chunks of 2147483648 bytes"),
    ],
)
def test_forged_chunks_lead_nowhere(
    tmp_path: Path, stored: list[bytes], sizes: list[int] | None, chunk_bytes: int, words: str
) -> None:
    path = forged(
        tmp_path / "ram",
        runs=[(0, 2)],
        data_pages=2,
        stored=stored,
        sizes=sizes,
        chunk_bytes=chunk_bytes,
    )
    with pytest.raises(CorruptError, match=words):
        read_header(path)


@pytest.mark.parametrize(
    "frame",
    [
        b"no frame at all",
        FRAME[:-1],
        FRAME + b"x",
        FRAME + FRAME,
        FRAME[:-1] + bytes([FRAME[-1] ^ 1]),
        zstandard.ZstdCompressor().compress(bytes(PAGE)),
        zstandard.ZstdCompressor().compress(bytes(64 << 20)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2 * PAGE)),
        b"\x50\x2a\x4d\x18\x08\0\0\0skippabl",
        b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8,
    ],
    ids=[
        "noise", "cut", "more", "twice", "its sum", "less", "a bomb", "unknown size", "skippable",
        "absurd size",
    ],
)  # fmt: skip
def test_a_frame_of_anything_else_is_refused(tmp_path: Path, frame: bytes) -> None:
    assert unpack(frame, 2 * PAGE) is None
    path = forged(tmp_path / "ram", runs=[(0, 2)], data_pages=2, stored=[frame])
    with pytest.raises(CorruptError, match="byte 4096 that cannot be unpacked"):
        verify(read_header(path))


@settings(max_examples=300, deadline=None)
@given(
    fields=st.lists(st.integers(0, (1 << 64) - 1) | st.integers(0, 300), min_size=6, max_size=6),
    version=st.sampled_from([1, 2]) | st.integers(0, 5),
    tables=st.binary(max_size=300),
    stored=st.binary(max_size=300),
)
def test_any_header_is_a_file_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    fields: list[int],
    version: int,
    tables: bytes,
    stored: bytes,
) -> None:
    """All of it made up, with sums that are right."""
    path = tmp_path_factory.mktemp("any") / "ram"
    ram_bytes, runs, data_pages, tables_bytes, stored_bytes, chunk_bytes = fields
    page = struct.pack(
        "<8sIIQ16s16sQQQ32sQI", b"SBXRAM\r\n", version, PAGE, ram_bytes % 64 * PAGE or ram_bytes,
        uuid.uuid4().bytes, bytes(16), runs, data_pages,
        tables_bytes if tables_bytes > 300 else len(tables), hashlib.sha256(tables).digest(),
        stored_bytes if stored_bytes > 300 else len(stored), chunk_bytes % (1 << 32),
    ).ljust(PAGE - 32, b"\0")  # fmt: skip
    path.write_bytes(page + hashlib.sha256(page).digest() + stored + tables)
    with contextlib.suppress(CorruptError):
        verify(read_header(path))


def test_a_chain_that_is_none_is_refused(tmp_path: Path) -> None:
    old, new, stranger = mint(), mint(), mint()
    write_pieces(tmp_path / old, old, None, [(0, [1])])
    write_pieces(tmp_path / new, new, old, [(1, [2])])
    write_pieces(tmp_path / stranger, old, stranger, [])
    with pytest.raises(CorruptError, match="of a RAM of"):
        chains.read_chain(new, tmp_path.joinpath, RAM * 2)
    with pytest.raises(CorruptError, match="says that it is"):
        chains.read_chain(stranger, tmp_path.joinpath, RAM)
    with (
        pytest.raises(CorruptError, match="does not stand on"),
        OpenChain(old, tmp_path.joinpath, RAM) as chain,
    ):
        chains.merge(chain, tmp_path / "merged", until=new)
    with OpenChain(new, tmp_path.joinpath, RAM) as chain:
        assert chains.merge(chain, tmp_path / "merged", until=None, go_on=lambda: False) is None
    assert not (tmp_path / "merged").exists()
    (tmp_path / old).unlink()
    with pytest.raises(CorruptError, match="missing"):
        chains.read_chain(new, tmp_path.joinpath, RAM)
    own = mint()
    write_pieces(tmp_path / own, own, own, [(0, [1])])
    with pytest.raises(CorruptError, match="own ancestor"):
        chains.read_chain(own, tmp_path.joinpath, RAM)


def test_who_has_opened_a_chain_reads_it_to_the_end(tmp_path: Path) -> None:
    """Whatever a merge renames and a sweep removes meanwhile."""
    oldest, old, new = mint(), mint(), mint()
    write_pieces(tmp_path / oldest, oldest, None, [(0, [1, 1, 1, 1])])
    write_pieces(tmp_path / old, old, oldest, [(1, [2, 2])])
    write_pieces(tmp_path / new, new, old, [(2, [3])])
    with OpenChain(new, tmp_path.joinpath, RAM) as before:
        with OpenChain(new, tmp_path.joinpath, RAM) as chain:
            merged = chains.merge(chain, tmp_path / "merged", until=None)
        assert merged is not None
        put_in_place(merged.path, tmp_path / new)
        (tmp_path / old).unlink()
        (tmp_path / oldest).unlink()
        expected = [1, 2, 3, 1] + [0] * (PAGES - 4)
        assert content(assemble(before, verify=True)) == expected
    assert content(assembled(tmp_path, new)) == expected


def test_chains_are_opened_whole_while_files_leave_them(tmp_path: Path) -> None:
    """Many readers, and one who takes a file out of the chain again and again."""
    ids = [mint() for _ in range(40)]
    for number, id in enumerate(ids):
        parent = ids[number - 1] if number else None
        write_pieces(tmp_path / id, id, parent, [(number % PAGES, [number % 200 + 1])])
    expected = content(assembled(tmp_path, ids[-1]))
    ended = threading.Event()

    def read() -> int:
        count = 0
        while not ended.is_set() or not count:
            assert content(assembled(tmp_path, ids[-1])) == expected
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for child, gone in zip(ids[:0:-1], ids[-2::-1], strict=True):
                with OpenChain(ids[-1], tmp_path.joinpath, RAM) as chain:
                    assert chain.files[1].id == gone, child
                    until = chain.files[2].id if len(chain.files) > 2 else None
                    merged = chains.merge(chain, tmp_path / "merged", until=until)
                assert merged is not None
                put_in_place(merged.path, tmp_path / ids[-1])
                (tmp_path / gone).unlink()
        finally:
            ended.set()
        assert all(reader.result() for reader in readers)
    assert [path.name for path in tmp_path.iterdir()] == [ids[-1]]


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
