"""A host that loses power: a daemon and guests of which only what was synced is left.

`fsyncs.c` is preloaded into them. `Power.cut` kills all at once and builds the state folder anew,
in a place of its own: every file as of its last fsync, every folder as of its own. That is the
worst that a file system may make of it. With a `chance`, some files and folders are as they were at
the cut instead, which is as legal.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.daemon import DaemonProcess, end

SOURCE = Path(__file__).with_name("fsyncs.c")


_SYNC_ALL = """
import os, sys
for folder, _, names in os.walk(sys.argv[1]):
    for path in (folder, *(os.path.join(folder, name) for name in names)):
        os.fsync(os.open(path, os.O_RDONLY))
"""


def build(folder: Path) -> Path:
    """Compile what is preloaded."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a C compiler is missing: install gcc")
    library = folder / "fsyncs.so"
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-O2", "-shared", "-fPIC", SOURCE, "-o", library, "-ldl"],
        check=True,
    )
    return library


class Power:
    """A daemon on a state folder, and what would be left of that."""

    def __init__(self, shared: Path) -> None:
        self._shared = shared
        self._library = build(shared)
        self._number = 0
        self._store = ""
        self.process = self._new()

    def cut(self, chance: random.Random | None = None) -> DaemonProcess:
        """End everything at once; another daemon process, not started, on what is left."""
        old, shadow = self.process, self._shadow
        self.off()
        self._number += 1
        new = self._new()
        _Rebuilding(shadow, chance).folder(_key(old.state), old.state, new.state)
        # What is left is on the disk, and so it is when the power goes for the next time.
        subprocess.run(
            [sys.executable, "-c", _SYNC_ALL, new.state], env=new.environment, check=True
        )
        self.process = new
        return new

    def off(self) -> None:
        """End everything at once. Nobody looks into the catalog any more: that could change it."""
        mark = f"guest=stratabox-{self._store}-".encode() if self._store else None
        if self.process.runs and mark is None:
            self._store = self.process.store_id()
            mark = f"guest=stratabox-{self._store}-".encode()
        self.process.kill()
        guests = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and mark and mark in (folder / "cmdline").read_bytes():
                    guests.append(int(folder.name))
        end(guests)  # gone, too: none of them finishes a copy into what is looked at next

    @property
    def _shadow(self) -> Path:
        return self._shared / f"shadow-{self._number}"

    def _new(self) -> DaemonProcess:
        folder = self._shared / f"host-{self._number}"
        folder.mkdir()
        for name in ("", "files", "folders", "locks", "parts"):
            (self._shadow / name).mkdir()
            (self._shadow / name).chmod(0o777)  # QEMU has a uid of its own
        variables = {
            "STRATABOX_FSYNC_ROOT": str(folder / "state"),
            "STRATABOX_FSYNC_SHADOW": str(self._shadow),
        }
        qemu = folder / "qemu"
        # The daemon gives QEMU an environment of its own, and sometimes something to preload.
        exports = "".join(f"export {name}={value}\n" for name, value in variables.items())
        qemu.write_text(
            f"#!/bin/sh\n{exports}"
            f"export LD_PRELOAD=${{LD_PRELOAD:+$LD_PRELOAD:}}{self._library}\n"
            f'exec {shutil.which("qemu-system-x86_64")} "$@"\n'
        )
        qemu.chmod(0o755)
        return DaemonProcess(
            folder,
            {**variables, "LD_PRELOAD": str(self._library), "STRATABOX_QEMU_BINARY": str(qemu)},
        )


class _Rebuilding:
    def __init__(self, shadow: Path, chance: random.Random | None) -> None:
        self._shadow = shadow
        self._chance = chance
        self._made: dict[str, Path] = {}

    def folder(self, key: str, old: Path, new: Path) -> None:
        """Make `new` of what is left of the folder of that key.

        :param old: where it lies as it was at the cut, if it is still there.
        """
        new.mkdir(mode=0o700)
        # An entry may have another name since the last sync, or none: content is found by its key.
        for kind, entry, name in self._entries(key, old):
            if kind == "d":
                self.folder(entry, old / name, new / name)
            elif kind == "f":
                self._file(entry, old / name, new / name)

    def _entries(self, key: str, old: Path) -> list[tuple[str, str, str]]:
        as_it_was = self._chance is not None and self._chance.random() < 0.5
        if as_it_was and old.is_dir() and _key(old) == key:
            return [
                ("d" if path.is_dir() else "f", _key(path), path.name)
                for path in sorted(old.iterdir())
                if path.is_dir() or path.is_file()
            ]
        listing = self._shadow / "folders" / key
        lines = sorted(listing.read_text().splitlines()) if listing.exists() else []
        return [(kind, entry, name) for kind, entry, name in (line.split(" ", 2) for line in lines)]

    def _file(self, key: str, old: Path, new: Path) -> None:
        if key in self._made:
            os.link(self._made[key], new)
            return
        self._made[key] = new
        synced = self._shadow / "files" / key
        as_it_was = self._chance is not None and self._chance.random() < 0.5
        if as_it_was and old.is_file() and _key(old) == key:
            synced = old
        if synced.exists():
            subprocess.run(["cp", "--sparse=always", synced, new], check=True)
            new.chmod(synced.stat().st_mode & 0o7777)
        else:
            new.touch(mode=0o600)


def _key(path: Path) -> str:
    """As `fsyncs.c` names it. Python's os.stat has no time of birth."""
    if not path.exists():
        return ""
    words = subprocess.run(
        ["stat", "--format=%i %.9W", path], check=True, capture_output=True, text=True
    ).stdout.split()
    seconds, nanoseconds = words[1].split(".")
    return f"{words[0]}-{int(seconds)}-{int(nanoseconds)}"


@contextmanager
def power() -> Iterator[Power]:
    """A host with power; at the end nothing of it is left."""
    # Not below pytest's folders, which QEMU's uid cannot enter.
    with tempfile.TemporaryDirectory(prefix="stratabox-power-") as name:
        shared = Path(name)
        shared.chmod(0o755)
        made = Power(shared)
        try:
            yield made
        finally:
            made.off()
