"""What callers give for a seed, and whether cloud-init could do anything with it. Pure.

cloud-init passes over user data that it cannot read, and says so in a log in the guest; who gave it
would wait for what never comes. So what can be seen before is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from stratabox.storage.model.errors import InvalidArgumentError

MAX_USER_DATA = 512 << 10
"""Bytes."""
MAX_KEYS = 64
_MAX_KEY = 16 << 10
_MAX_DEPTH = 64

_CONFIG = b"#cloud-config"
_BEGINNINGS = (
    b"#!",
    b"#cloud-boothook",
    b"#cloud-config-archive",
    b"#cloud-config-jsonp",
    b"#include",
    b"#part-handler",
    b"## template: jinja",
    b"\x1f\x8b",  # all of it compressed
)
_MIME = re.compile(rb"(?i)(content-type|mime-version):")
_KEY = re.compile(r"[a-z0-9@.-]{4,64} [A-Za-z0-9+/]{16,}={0,2}( [^\n\0]*)?", re.ASCII)


def check_user_data(data: bytes) -> None:
    """:raise InvalidArgumentError: INVALID_USER_DATA, for what cloud-init would pass over.

    Takes long for much of it: not for the event loop.
    """
    if not data:
        return
    if len(data) > MAX_USER_DATA:
        raise _invalid(f"it has {len(data)} bytes, and {MAX_USER_DATA} are allowed")
    first = data.split(b"\n", 1)[0].rstrip()
    if first == _CONFIG:
        _check_config(data)
    elif not data.startswith(_BEGINNINGS) and not _MIME.match(data):
        raise _invalid(
            "cloud-init knows it by its first line, which must be '#cloud-config', '#!' with a"
            f" program, or another of its kinds, and is {first[:60].decode(errors='replace')!r}"
        )


def check_keys(keys: Sequence[str]) -> None:
    """:raise InvalidArgumentError: for what is no line of an authorized_keys file."""
    if len(keys) > MAX_KEYS:
        raise InvalidArgumentError(
            f"{len(keys)} SSH keys; {MAX_KEYS} are allowed", field="ssh_keys"
        )
    for key in keys:
        if len(key) > _MAX_KEY or not _KEY.fullmatch(key):
            raise InvalidArgumentError(
                f"{key[:60]!r} is no public SSH key: give the line of a .pub file",
                field="ssh_keys",
            )


def _check_config(data: bytes) -> None:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(data, Loader=loader):
            if isinstance(event, yaml.events.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.events.CollectionEndEvent):
                depth -= 1
            if depth > _MAX_DEPTH:
                raise _invalid(f"it is nested more than {_MAX_DEPTH} deep")
        node = yaml.compose(data, Loader=loader)
    except yaml.YAMLError as error:
        raise _invalid(f"it is no YAML: {' '.join(str(error).split())[:500]}") from error
    except UnicodeDecodeError as error:
        raise _invalid("it is no UTF-8") from error
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise _invalid("a #cloud-config is a mapping ('key: value')")


def _invalid(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"cloud-init could not use that user data: {what}",
        reason="INVALID_USER_DATA",
        field="user_data",
    )
