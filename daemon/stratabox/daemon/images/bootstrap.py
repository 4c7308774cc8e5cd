"""Run mmdebstrap, and a script of ours in it that carries files in and out.

As root it works by root's means, else in a user namespace (``--mode=unshare``) where our own
folders cannot be entered. So the script and all files that it reads or writes are handed over as
open file descriptors; the script names them ``/proc/self/fd/N``. The root file system never leaves
mmdebstrap's own temporary folder but as a finished disk, so its owners and modes are right.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.images import process
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_RELEASE = re.compile(r"[a-z][a-z0-9-]{1,31}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{1,99}")
_MAX_PACKAGES = 200
_FIRST_FD = 100
_NO_USRMERGE = (
    # Make the links that the package usrmerge would make, and do without it and all of Perl.
    'for d in bin sbin lib lib64; do mkdir -p "$1/usr/$d"; ln -s "usr/$d" "$1/$d"; done; '
    'mkdir -p "$1/etc/apt/preferences.d"; '
    'printf "Package: usrmerge\nPin: release *\nPin-Priority: -1\n" '
    '>"$1/etc/apt/preferences.d/00stratabox"'
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run of mmdebstrap."""

    release: str
    variant: str
    """mmdebstrap's word: "custom" starts with nothing, "apt" with essential packages and apt."""
    script: Path
    """Shell script run on the host when all is installed; $1 is the root file system."""
    include: Sequence[str] = ()
    dpkg_options: Sequence[str] = ()
    env: Sequence[tuple[str, str]] = ()
    arguments: Sequence[str] = ()
    """Words for the script, after its files; ours, never a client's."""


def check_release(release: str) -> str:
    """Return a Debian code name or suite as it is.

    :raise InvalidArgumentError: INVALID_ARGUMENT, when it cannot be one.
    """
    if not _RELEASE.fullmatch(release):
        raise InvalidArgumentError(f"{release[:80]!r} is no name of a Debian release.")
    return release


def check_packages(packages: Sequence[str]) -> tuple[str, ...]:
    """Return package names as they are, each once.

    :raise InvalidArgumentError: INVALID_ARGUMENT, when one cannot be a Debian package's name.
    """
    if len(packages) > _MAX_PACKAGES:
        raise InvalidArgumentError(f"{len(packages)} packages; {_MAX_PACKAGES} are allowed.")
    for package in packages:
        if not _PACKAGE.fullmatch(package):
            raise InvalidArgumentError(f"{package[:80]!r} is no name of a Debian package.")
    return tuple(dict.fromkeys(packages))


def check_host() -> None:
    """Let a host pass that can build Debian root file systems.

    :raise DeniedError: TOOL_MISSING; says what to install or to set up.
    """
    process.require("mmdebstrap", "mke2fs", "qemu-img", "unshare")
    if not KEYRING.exists():
        raise DeniedError(
            f"{KEYRING} is missing on this host: apt install debian-archive-keyring.",
            reason="TOOL_MISSING",
            package="debian-archive-keyring",
        )
    if os.geteuid() == 0:
        return
    process.require("newuidmap")
    user = getpass.getuser()
    for table in (Path("/etc/subuid"), Path("/etc/subgid")):
        lines = table.read_text().splitlines() if table.exists() else []
        if not any(line.startswith((f"{user}:", f"{os.getuid()}:")) for line in lines):
            raise DeniedError(
                f"{table} has no ids for {user}: as root, usermod --add-subuids 100000-165535 "
                f"--add-subgids 100000-165535 {user}.",
                reason="TOOL_MISSING",
                package="uidmap",
            )


async def bootstrap(
    recipe: Recipe,
    *,
    reads: Sequence[Path],
    writes: Sequence[Path],
    on_line: Callable[[str], None],
) -> None:
    """Build a root file system and run the recipe's script on it.

    The script gets: $1 the root file system, then a name for each of `reads`, then one for each of
    `writes`, then the recipe's `arguments`. Written files are made empty before. Raises as
    `process.run`.
    """
    with contextlib.ExitStack() as stack:
        script = _open(stack, recipe.script, os.O_RDONLY)
        handed = [_open(stack, path, os.O_RDONLY) for path in reads]
        for path in writes:
            fd = _open(stack, path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            # Another uid opens it anew by /proc/self/fd; only who has the descriptor can get there.
            os.fchmod(fd, 0o666)
            handed.append(fd)
        words = [f"/proc/self/fd/{fd}" for fd in handed] + [
            shlex.quote(word) for word in recipe.arguments
        ]
        names = " ".join(words)
        root = os.geteuid() == 0
        await process.run(
            [
                "mmdebstrap",
                f"--mode={'root' if root else 'unshare'}",
                f"--variant={recipe.variant}",
                "--format=null",
                "--skip=cleanup",  # all that is left is thrown away
                "--architectures=amd64",
                f"--keyring={KEYRING}",
                *(f"--include={package}" for package in recipe.include),
                *(f"--dpkgopt={option}" for option in recipe.dpkg_options),
                f"--setup-hook={_NO_USRMERGE}",
                f'--customize-hook=sh -eu /proc/self/fd/{script} "$1" {names}',
                recipe.release,
                "-",
            ],
            what=f"Installing Debian {recipe.release}",
            pass_fds=[script, *handed],
            # /tmp may be memory.
            env={"TMPDIR": os.environ.get("TMPDIR", "/var/tmp"), **dict(recipe.env)},
            on_line=on_line,
        )


def _open(stack: contextlib.ExitStack, path: Path, flags: int) -> int:
    """Open a file as a descriptor of a high number: mmdebstrap needs the low ones.

    (It lets a shell write to the next free one, and dash knows one digit only.)
    """
    low = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        fd = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
    finally:
        os.close(low)
    stack.callback(os.close, fd)
    return fd
