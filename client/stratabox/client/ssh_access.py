"""What stock ssh needs to log in to guests: the user's key, known hosts, options. No network here.

```
CONFIG/stratabox/ssh/id_ed25519, .pub   this user's key for guests; made when first needed
                     known_hosts/ID     the host keys of one guest, as the daemon tells them
```

Each connection goes by `stratabox sandbox ssh-proxy`, which asks the daemon for a session of the
guest's sshd and writes the guest's known hosts anew before ssh looks at them: they are learnt from
the daemon, by a way that is trusted, never from the wire.
"""

from __future__ import annotations

import fcntl
import getopt
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stratabox.client.errors import StrataboxError
from stratabox.client.records import SandboxRecord

_KEPT_SECONDS = 30 * 24 * 3600
"""Known hosts that nobody has used for so long are removed."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_HOST_KEY = re.compile(r"[a-z0-9@.-]{1,64} [A-Za-z0-9+/]{16,4096}={0,2}")

_SSH_FLAGS = "1246ab:c:e:fgi:kl:m:no:p:qstvxAB:CD:E:F:GI:J:KL:MNO:P:Q:R:S:TVw:W:XYy"


def folder(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder of all this."""
    env = os.environ if environ is None else environ
    config = env.get("XDG_CONFIG_HOME", "")
    base = Path(config) if config.startswith("/") else Path(env.get("HOME") or Path.home())
    return (base if config.startswith("/") else base / ".config") / "stratabox" / "ssh"


def identity(where: Path) -> Path:
    """Return this user's key for guests, made where it is missing; its public half is beside it.

    :raise StrataboxError: TOOL_MISSING, KEY_FAILED.
    """
    key = where / "id_ed25519"
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (where / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once must not make two
        if not (key.exists() and public_file(key).exists()):
            _make(key)
    return key


def public_file(key: Path) -> Path:
    """Return the file of a key's public half."""
    return key.with_name(f"{key.name}.pub")


def known_hosts_file(where: Path, sandbox_id: str) -> Path:
    """Return the file of one guest's host keys."""
    return where / "known_hosts" / sandbox_id


def write_known_hosts(where: Path, sandbox_id: str, host_keys: Iterable[str]) -> None:
    """Write down how a guest is known, in place of what was known before.

    What is no host key is left out.
    """
    file = known_hosts_file(where, sandbox_id)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = (f"{alias(sandbox_id)} {key}\n" for key in host_keys if _HOST_KEY.fullmatch(key))
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".new-", delete=False) as aside:
        aside.writelines(lines)
    Path(aside.name).rename(file)


def prune(where: Path) -> None:
    """Remove the known hosts of guests that nobody has logged in to for a month."""
    limit = time.time() - _KEPT_SECONDS
    for file in where.glob("known_hosts/*"):
        try:
            if file.stat().st_mtime < limit:
                file.unlink()
        except FileNotFoundError:
            continue


def alias(sandbox_id: str) -> str:
    """Return the name by which a guest is in its known hosts."""
    return f"stratabox-{sandbox_id}"


def options(
    where: Path,
    sandbox_id: str,
    address: str,
    user: str = "root",
    workspace: str | None = None,
) -> list[tuple[str, str]]:
    """Return the options by which ssh reaches one guest, spelled as in its configuration file."""
    words = [sys.executable, "-m", "stratabox.client.cli"]
    words += ["sandbox", "ssh-proxy", "--address", address]
    words += ["--workspace", workspace] if workspace else []
    # ssh replaces %r by who logs in; every other % must be doubled.
    proxy = " ".join(_escaped(shlex.quote(word)) for word in words)
    return [
        ("HostName", sandbox_id),
        ("HostKeyAlias", alias(sandbox_id)),
        ("User", user),
        ("IdentityFile", _quoted(str(where / "id_ed25519"))),
        ("IdentitiesOnly", "yes"),
        ("UserKnownHostsFile", _quoted(str(known_hosts_file(where, sandbox_id)))),
        ("GlobalKnownHostsFile", "/dev/null"),
        ("StrictHostKeyChecking", "yes"),
        ("UpdateHostKeys", "no"),
        ("ProxyCommand", f"{proxy} --user '%r' {sandbox_id}"),
    ]


def command(
    where: Path,
    sandbox_id: str,
    address: str,
    arguments: Sequence[str],
    workspace: str | None = None,
) -> list[str]:
    """Return the command line of stock ssh into one guest; as root, unless they name another."""
    chosen = options(where, sandbox_id, address, workspace=workspace)
    # On a command line the first user that is named would win, and the caller's come last.
    if _names_user(arguments):
        chosen = [each for each in chosen if each[0] != "User"]
    flags = [word for name, value in chosen for word in ("-o", f"{name}={value}")]
    return ["ssh", *flags, sandbox_id, *arguments]


def config(
    where: Path,
    sandboxes: Sequence[SandboxRecord],
    address: str,
    user: str = "root",
    workspace: str | None = None,
) -> str:
    """Write the configuration of ssh: a Host entry for each sandbox, by its id and its name.

    A name that several have, or that cannot be a host's, is left out; a comment says so.
    """
    names = Counter(each.name for each in sandboxes)
    ids = {each.id for each in sandboxes}
    parts = [
        "# Written by 'stratabox ssh-config', for ssh, scp, sftp and rsync, with -F or Include.\n"
    ]
    for each in sandboxes:
        hosts = each.id
        remark = ""
        if not _NAME.fullmatch(each.name):
            remark = f"    # its name cannot be a host's: {_shown(each.name)}\n"
        elif names[each.name] > 1 or each.name in ids:
            remark = f"    # others have its name, too: {_shown(each.name)}\n"
        else:
            hosts = f"{each.id} {each.name}"
        chosen = options(where, each.id, address, user, workspace)
        lines = (f"    {name} {value}\n" for name, value in chosen)
        parts.append(f"\nHost {hosts}\n{remark}{''.join(lines)}")
    return "".join(parts)


def _make(key: Path) -> None:
    with tempfile.TemporaryDirectory(dir=key.parent) as aside:
        new = Path(aside) / key.name
        made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "stratabox", "-f", str(new)]
        try:
            done = subprocess.run(
                made, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise StrataboxError(
                "there is no ssh-keygen here: install openssh-client", reason="TOOL_MISSING"
            ) from None
        if done.returncode:
            raise StrataboxError(
                f"ssh-keygen could not make a key: {done.stderr.strip()}", reason="KEY_FAILED"
            )
        public_file(new).rename(public_file(key))
        new.rename(key)


def _names_user(arguments: Sequence[str]) -> bool:
    try:
        given, _ = getopt.getopt(list(arguments), _SSH_FLAGS)
    except getopt.GetoptError:  # ssh itself has more to say about it
        return False
    return any(
        flag == "-l" or (flag == "-o" and value.lower().lstrip().startswith("user"))
        for flag, value in given
    )


def _quoted(value: str) -> str:
    return f'"{_escaped(value)}"'


def _escaped(value: str) -> str:
    return value.replace("%", "%%")


def _shown(text: str) -> str:
    return ascii(text)
