"""Public keys that callers give: one line each, as in a .pub file. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import asyncssh
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from stratabox.storage.model.errors import InvalidArgumentError

MOST = 64
"""Keys of one user."""
HOST_KEY = re.compile(r"[a-z0-9@.-]{1,64} [A-Za-z0-9+/]{16,4096}={0,2}")
"""What may be told on as a guest's host key."""

_LINE_BYTES = 8 << 10
_RSA_BITS = 2048
_TYPES = (
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)


def checked(line: str) -> str:
    """A public key's line, with nothing in it but type, base64 and comment.

    :raise InvalidArgumentError: when it is no key, has options, or is weak.
    """
    if len(line) > _LINE_BYTES:
        raise InvalidArgumentError(f"a public key is longer than {_LINE_BYTES} bytes")
    kind, *rest = line.split(None, 2)[:3] or [""]
    if kind not in _TYPES or not rest:
        raise InvalidArgumentError(
            f"{line[:80]!r} is no public key as in a .pub file; types are {', '.join(_TYPES)}"
        )
    comment = rest[1].strip() if len(rest) > 1 else ""
    if not comment.isprintable():
        raise InvalidArgumentError("a public key's comment holds control characters, or lines")
    try:
        key = asyncssh.import_public_key(f"{kind} {rest[0]}")
    except (asyncssh.KeyImportError, ValueError) as error:
        raise InvalidArgumentError(f"{line[:80]!r} is no public key: {error}") from error
    inner = key.pyca_key
    if isinstance(inner, RSAPublicKey) and inner.key_size < _RSA_BITS:
        raise InvalidArgumentError(
            f"an RSA key of {inner.key_size} bits is too weak: {_RSA_BITS} are the least"
        )
    return f"{kind} {rest[0]} {comment}".rstrip()


def all_checked(lines: Sequence[str]) -> list[str]:
    """All keys of one user, each once. :raise InvalidArgumentError: for one, or too many."""
    if len(lines) > MOST:
        raise InvalidArgumentError(f"{len(lines)} public keys are given, and {MOST} may be")
    by_key = {" ".join(line.split()[:2]): line for line in map(checked, lines)}
    return list(by_key.values())


def fingerprint(line: str) -> str:
    """The SHA-256 fingerprint of a key that `checked` has passed."""
    return asyncssh.import_public_key(" ".join(line.split()[:2])).get_fingerprint()


def bare(line: str) -> str:
    """The key without its comment."""
    return " ".join(line.split()[:2])
