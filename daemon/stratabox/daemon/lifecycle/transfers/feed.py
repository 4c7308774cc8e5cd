"""Bytes that come in pieces, given to parsers in the portions that they want."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeVar

from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.storage.files.transfer.archive import invalid
from stratabox.storage.files.transfer.parsing import Parser
from stratabox.storage.model.errors import InvalidArgumentError

T = TypeVar("T")


class Feed:
    """An archive that is coming. Holds one piece, and what a parser is waiting for."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._held = bytearray()
        self.offset = 0
        """Bytes that parsers have got."""

    async def run(self, parser: Parser[T]) -> T:
        """Let a parser come to its end; each of its steps in a thread.

        :raise InvalidArgumentError: INVALID_ARCHIVE, with the `offset` of what is wrong.
        """
        try:
            wanted, result = await in_thread(_step, parser, None)
            while not result:
                piece = await self._take(wanted)
                wanted, result = await in_thread(_step, parser, piece)
                self.offset += len(piece)
            return result[0]
        except InvalidArgumentError as error:
            error.metadata.setdefault("offset", str(self.offset))
            raise
        finally:
            await in_thread(parser.close)

    async def end(self) -> None:
        """Nothing may come any more. :raise InvalidArgumentError: INVALID_ARCHIVE."""
        while not self._held:
            piece = await anext(self._pieces, None)
            if piece is None:
                return
            self._held += piece
        raise invalid(f"there is more behind its end, at byte {self.offset}")

    async def _take(self, wanted: int) -> bytes:
        while len(self._held) < wanted:
            piece = await anext(self._pieces, None)
            if piece is None:
                whole = self.offset + len(self._held)
                raise invalid(f"it ends at byte {whole}, in the middle: it was not finished")
            self._held += piece
        taken = bytes(self._held[:wanted])
        del self._held[:wanted]
        return taken


def _step(parser: Parser[T], piece: bytes | None) -> tuple[int, tuple[T] | None]:
    """How many bytes it wants next; or what it returns (no thread can be left by StopIteration)."""
    try:
        return (next(parser) if piece is None else parser.send(piece)), None
    except StopIteration as end:
        return 0, (end.value,)
