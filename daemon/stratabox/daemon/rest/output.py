"""What a command has printed, as JSON, in pieces: 16 MiB of each stream at once would hold up
everything else for as long as it takes to write them as text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import AsyncIterator, Iterator

from stratabox.daemon.hypervisor.guest.exec import ExecResult

_PIECE = 64 << 10


async def of_command(result: ExecResult) -> AsyncIterator[bytes]:
    """The body of ``models.Executed``."""
    facts = {
        "exit_code": None if result.signal else result.exit_code,
        "signal": result.signal or None,
        "stdout_truncated": result.stdout_truncated,
        "stderr_truncated": result.stderr_truncated,
        "timed_out": result.timed_out,
        "duration_ms": round(result.duration * 1000),
    }
    yield json.dumps(facts)[:-1].encode()
    for name, data in (("stdout", result.stdout), ("stderr", result.stderr)):
        yield f', "{name}": "'.encode()
        for piece in _text(data):
            yield json.dumps(piece)[1:-1].encode()
        yield b'"'
    yield b"}"


def _text(data: bytes) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    view = memoryview(data)
    for start in range(0, len(data), _PIECE):
        yield decoder.decode(view[start : start + _PIECE])
    yield decoder.decode(b"", final=True)
