"""One JSON object of a manifest, read field by field; what is left over is refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from stratabox.storage.files.transfer.archive import invalid
from stratabox.storage.model.ids import Sha256

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Fields:
    """An object whose fields are taken one after another.

    :param where: what it is, for messages.
    :raise InvalidArgumentError: INVALID_ARCHIVE, from every method, naming the place.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise invalid(f"{where} is not an object")
        self._left: dict[str, Any] = dict(value)
        self.where = where

    def end(self) -> None:
        """Nothing may be left."""
        if self._left:
            raise invalid(f"{self.where} has unknown fields: {sorted(self._left)[0][:40]!r}")

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number within bounds."""
        value = self._take(name)
        if type(value) is not int or not low <= value <= high:  # bool is an int
            raise self._wrong(name)
        return value

    def whole_or_none(self, name: str, low: int, high: int) -> int | None:
        """The same, or null."""
        return None if self._is_null(name) else self.whole(name, low, high)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._take(name)
        if not isinstance(value, bool):
            raise self._wrong(name)
        return value

    def flag_or(self, name: str, *, default: bool) -> bool:
        """True or false; the default where there is no such field, as in older archives."""
        return self.flag(name) if name in self._left else default

    def text(self, name: str, limit: int, pattern: re.Pattern[str] | None = None) -> str:
        """Text of at most so many bytes, which is wholly as `pattern` says."""
        value = self._text(name, self._take(name), limit)
        if pattern is not None and not pattern.fullmatch(value):
            raise self._wrong(name)
        return value

    def word(self, name: str, words: Collection[str]) -> str:
        """One of these."""
        value = self.text(name, 64)
        if value not in list(words):
            raise self._wrong(name)
        return value

    def words(self, name: str, count: int, pattern: re.Pattern[str]) -> Iterator[str]:
        """A list of at most so many texts that are as `pattern` says."""
        for value in self._list(name, count):
            if not pattern.fullmatch(self._text(name, value, 255)):
                raise self._wrong(name)
            yield value

    def digest(self, name: str) -> Sha256:
        """A SHA-256 in hexadecimal."""
        return Sha256(self.text(name, 64, _SHA256))

    def digest_or_none(self, name: str) -> Sha256 | None:
        """The same, or null."""
        return None if self._is_null(name) else self.digest(name)

    def digest_if_there(self, name: str) -> Sha256 | None:
        """The same; None where there is no such field, as in older archives."""
        return self.digest(name) if name in self._left else None

    def texts(self, name: str, count: int, size: int) -> dict[str, str]:
        """An object of texts, of at most so many entries and bytes in all."""
        value = self._take(name)
        if not isinstance(value, dict) or len(value) > count:
            raise self._wrong(name)
        total = 0
        for each in (*value.keys(), *value.values()):
            total += len(self._text(name, each, size).encode())
        if total > size:
            raise self._wrong(name)
        return value

    def inner(self, name: str) -> Fields:
        """An object."""
        return Fields(self._take(name), f"{self.where}: {name}")

    def optional(self, name: str) -> Fields | None:
        """An object, or null."""
        return None if self._is_null(name) else self.inner(name)

    def items(self, name: str, count: int) -> Iterator[Fields]:
        """A list of at most so many objects."""
        for at, value in enumerate(self._list(name, count)):
            yield Fields(value, f"{self.where}: {name} {at}")

    def _list(self, name: str, count: int) -> list[Any]:
        value = self._take(name)
        if not isinstance(value, list) or len(value) > count:
            raise self._wrong(name)
        return value

    def _text(self, name: str, value: object, limit: int) -> str:
        if not isinstance(value, str) or len(value) > limit:
            raise self._wrong(name)
        try:
            if len(value.encode()) > limit:
                raise self._wrong(name)
        except UnicodeEncodeError:  # half of a surrogate pair, as \ud800
            raise self._wrong(name) from None
        return value

    def _is_null(self, name: str) -> bool:
        if self._left.get(name, 0) is None:
            del self._left[name]
            return True
        return False

    def _take(self, name: str) -> Any:
        if name not in self._left:
            raise invalid(f"{self.where} has no field {name!r}")
        return self._left.pop(name)

    def _wrong(self, name: str) -> Exception:
        return invalid(f"{self.where} has a field {name!r} that cannot be")
