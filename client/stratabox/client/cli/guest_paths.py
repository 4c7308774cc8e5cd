"""Files in guests on the command line: what names them, and how they are shown."""

from __future__ import annotations

import base64
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from stratabox.client.cli.output import jsonable
from stratabox.client.file_records import FileChange, FileInfo, FileKind

_GUEST = re.compile(r"([^/:]+):(.*)", re.DOTALL)
_LETTERS = {FileKind.REGULAR: "-", FileKind.DIRECTORY: "d", FileKind.SYMLINK: "l"}
_TYPES = {
    FileKind.REGULAR: stat.S_IFREG,
    FileKind.DIRECTORY: stat.S_IFDIR,
    FileKind.SYMLINK: stat.S_IFLNK,
}


@dataclass(frozen=True)
class InGuest:
    """A path in a guest."""

    sandbox: str
    path: str


def guest_path(text: str) -> InGuest | None:
    """Read SANDBOX:/PATH; None: it names a file here.

    :raise ValueError: when the path is not absolute.
    """
    match = _GUEST.fullmatch(text)
    if match is None:
        return None
    if not match[2].startswith("/"):
        raise ValueError(
            f"{text!r}: the path in a guest is absolute, as {match[1]}:/path;"
            f" a file here that is called so is ./{text}"
        )
    return InGuest(match[1], match[2])


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # generic only in newer stubs
    _ParamType = click.ParamType


class _GuestPathType(_ParamType):
    name = "SANDBOX:/PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the text."""
        if not isinstance(value, str):
            return value
        try:
            found = guest_path(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if found is None:
            self.fail(f"{value!r} is not SANDBOX:/PATH", param, ctx)
        return found


GUEST_PATH = _GuestPathType()

user_option: Callable[[Any], Any] = click.option(
    "--user", "-u", metavar="USER", help="As this user of the guest; as root."
)


def shown(path: bytes) -> str:
    """A path for people; what is no UTF-8 is escaped."""
    return path.decode("utf-8", "backslashreplace")


def mode_text(info: FileInfo) -> str:
    """Kind and permission bits, as ls(1) writes them."""
    text = stat.filemode(info.mode | _TYPES.get(info.kind, 0))
    return _LETTERS.get(info.kind, "?") + text[1:]


def as_json(record: FileInfo | FileChange) -> dict[str, Any]:
    """A record for programs: paths as text, and as base64 too where they are no UTF-8."""
    body: dict[str, Any] = {}
    for name, value in vars(record).items():
        if isinstance(value, bytes):
            body[name] = value.decode("utf-8", "replace")
            is_text = body[name].encode() == value
            body[f"{name}_base64"] = None if is_text else base64.b64encode(value).decode()
        else:
            body[name] = jsonable(value)
    return body
