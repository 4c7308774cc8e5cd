"""Who Tenki's sessions are in their guests, and how they name files there. Pure."""

from __future__ import annotations

from stratabox.storage.model.errors import InvalidArgumentError

USER = "tenki"
HOME = "/home/tenki"


def absolute(path: str) -> str:
    """A path in the guest: relative ones begin at the home, and "" is the home."""
    if path in ("", ".", "./", f"{HOME}/"):
        return HOME
    return path if path.startswith("/") else f"{HOME}/{path}"


def path_from(path: str) -> bytes:
    """The path that a request names.

    :raise InvalidArgumentError: when it names none.
    """
    if not path:
        raise InvalidArgumentError("path is empty: name a file", field="path")
    return absolute(path).encode()
