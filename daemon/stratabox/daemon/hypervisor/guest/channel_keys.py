"""The two keys of a store's channels: the daemon's own, and the one by which its guests answer.

```
FOLDER/client    who the daemon is to the sshd of a guest's channel; ed25519, mode 0600
FOLDER/host      what that sshd proves its part with; it is given to guests, and nowhere else
```

Both are made here and reach a guest through its agent, so nothing is ever believed because the wire
said so first. All guests of a store have the same host key: which of them answers is said by the
socket, which is QEMU's, and the key only that the guest was told by this store. A guest's own host
keys, which copies renew, are another matter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import asyncssh


@dataclass(frozen=True)
class ChannelKeys:
    """A store's two keys."""

    client: asyncssh.SSHKey
    host: asyncssh.SSHKey


@lru_cache(maxsize=16)
def load(folder: Path) -> ChannelKeys:
    """The keys in a folder; those that are not there are made. Blocks for some ms the first time.

    :raise OSError: when the disk fails.
    :raise ValueError: for a file that holds no key.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    return ChannelKeys(_key(folder / "client"), _key(folder / "host"))


def public_line(key: asyncssh.SSHKey) -> str:
    """A key's public half, as a line of authorized_keys."""
    return key.export_public_key().decode().strip()


def _key(path: Path) -> asyncssh.SSHKey:
    if not path.exists():
        key = asyncssh.generate_private_key("ssh-ed25519", comment="stratabox")
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.unlink(missing_ok=True)
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.export_private_key())
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    return asyncssh.import_private_key(path.read_bytes())
