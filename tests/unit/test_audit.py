"""How much keys may do, and how it is written down."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from stratabox.daemon.access.audit import FILES, AuditLog
from stratabox.daemon.access.keys import new_token
from stratabox.daemon.access.limits import Limiter, Limits
from stratabox.storage.model.errors import RateLimitedError

# -- limits ---------------------------------------------------------------------------------------


def test_a_bucket_empties_and_fills() -> None:
    now = [0.0]
    limiter = Limiter(Limits(rate=2, burst=3, open=1), clock=lambda: now[0])
    for _ in range(3):
        limiter.take("a")
    with pytest.raises(RateLimitedError) as caught:
        limiter.take("a")
    assert caught.value.retry_after == 0.5
    limiter.take("b")
    now[0] += 0.5
    limiter.take("a")
    with pytest.raises(RateLimitedError):
        limiter.take("a")
    now[0] += 1000
    for _ in range(3):
        limiter.take("a")
    with pytest.raises(RateLimitedError):
        limiter.take("a")


def test_calls_under_way() -> None:
    limiter = Limiter(Limits(rate=0, burst=1, open=2))
    for _ in range(1000):
        limiter.take("a")
    limiter.enter("a")
    limiter.enter("a")
    with pytest.raises(RateLimitedError) as caught:
        limiter.enter("a")
    assert caught.value.reason == "TOO_MANY_CALLS"
    limiter.enter("b")
    limiter.leave("a")
    limiter.enter("a")


# -- the audit log --------------------------------------------------------------------------------


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "audit" / "calls.jsonl"
    size = FILES * 1000
    log = AuditLog(path, size)
    for number in range(1000):
        log.note({"number": number})
    log.close()
    files = sorted(path.parent.iterdir(), key=lambda each: each.stat().st_mtime_ns)
    assert len(files) == FILES
    assert sum(each.stat().st_size for each in files) <= size
    numbered = [path.with_name(f"{path.name}.{number}") for number in range(FILES - 1, 0, -1)]
    numbers = [line["number"] for each in (*numbered, path) for line in lines_of(each)]
    assert numbers == list(range(1000))[-len(numbers) :]
    again = AuditLog(path, size)
    again.note({"number": 1000})
    again.close()
    assert lines_of(path)[-1] == {"number": 1000}
    AuditLog(tmp_path / "none" / "x", 0).note({})
    assert not (tmp_path / "none").exists()


def test_where_it_cannot_lie_it_is_later(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    folder.touch()  # in its place, as a full disk has no room for it
    log = AuditLog(folder / "calls", 1 << 20)
    log.note({"number": 0})
    while not log._failed:
        os.sched_yield()
    folder.unlink()
    log.note({"number": 1})
    log.close()
    assert lines_of(folder / "calls") == [{"lost": 1}, {"number": 1}]


def test_half_a_line_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "calls"
    path.write_text('{"a":1}\n{"b"')
    log = AuditLog(path, 1 << 20)
    log.note({"c": 3})
    log.close()
    assert path.read_text() == '{"a":1}\n{"b"\n{"c":3}\n'


def test_what_could_not_be_written_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path / "calls", 1 << 20)
    real, full = os.write, [True]

    def write(descriptor: int, data: bytes) -> int:
        if full[0]:
            if len(data) > 3:
                return real(descriptor, data[:3])  # as on a disk that fills up
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    for number in range(3):
        log.note({"number": number})
    while log._failed < 3:
        os.sched_yield()
    log.note({"large": "x" * 10_000})
    full[0] = False
    log.note({"number": 3})
    log.close()
    assert lines_of(tmp_path / "calls") == [{"lost": 4}, {"number": 3}]


def test_no_key_gets_into_the_log(tmp_path: Path) -> None:
    token = new_token()
    log = AuditLog(tmp_path / "calls", 1 << 20)
    log.note({"names": {"sandbox": token.text()}})
    log.close()
    assert lines_of(tmp_path / "calls") == [{"names": {"sandbox": f"tk_{token.id}_..."}}]
