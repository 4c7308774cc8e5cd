"""Within what walls a QEMU of libvirt's runs: found at each start, by the program that becomes it.

What can be had depends on what libvirtd runs in, which only a process that it has started knows:
so ``emulator.c`` tries, and tells. They are the plain launcher's (``walls.h``) but for the pid
namespace: who is born in one is another process, and libvirt goes by the number of the one that it
started, and by the numbers of its threads. Instead /proc shows a QEMU itself alone, and whom it
could signal is kept from it by its uid, which is its own, or by Landlock.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.hypervisor import confinement
from stratabox.daemon.hypervisor.confinement import Confinement, Reopened, Walls

_SPACES = "umnih"
_SIGNALS = 6  # the version of Landlock from which on it knows of them


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one start had."""

    walls: Walls
    why: str = ""
    """Why not more; empty: there is all."""


async def choose(qemu: Path, *, required: bool) -> Confinement:
    """What each start tries to have: all, unless that QEMU does not run in it.

    That is tried here: a script that stands in QEMU's place, say, needs more than QEMU does.

    :raise DeniedError: CONFINEMENT_UNAVAILABLE, when all is required and cannot be had.
    """
    lacks = missing(confinement.landlock_version(), own_uid=os.geteuid() == 0)
    if required and lacks:
        raise confinement.denied(lacks)
    here = await asyncio.to_thread(confinement.examine, qemu)
    if here.walls is Walls.PLAIN and confinement.landlock_version():
        if required:
            raise confinement.denied(here.why)
        confinement.warn(here.walls, here.why)
        return here
    return wanted(qemu)


def wanted(qemu: Path) -> Confinement:
    """All that a start can try to have."""
    return Confinement(walls=Walls.FULL, trees=confinement.trees_of(qemu))


def options(wish: Confinement, *, reopened: Reopened, kvm: bool, own_uid: bool) -> list[str]:
    """What the program that becomes QEMU is told of them; none where they are switched off.

    :param own_uid: QEMU's user is its own, and may not enter the state folder.
    """
    if wish.walls is Walls.PLAIN:
        return []
    if own_uid:
        # It could not find the folders by their paths, nor what is above them.
        folders = dict.fromkeys(reopened.folders)
        reopened = Reopened(folders=folders, files=reopened.files, devices=reopened.devices)
    return wish.options(spaces=_SPACES, reopened=reopened, devices=["/dev/kvm"] if kvm else [])


def missing(landlock: int, *, own_uid: bool) -> str:
    """What this kernel lacks, whoever runs QEMU; empty: nothing.

    :param landlock: the version of its Landlock; 0: none.
    """
    if not landlock:
        return "this kernel has no Landlock"
    if not own_uid and landlock < _SIGNALS:
        return (
            f"without a pid namespace it takes Landlock {_SIGNALS} to keep a guest's QEMU from"
            f" signalling its own user's processes, and this kernel has Landlock {landlock}"
        )
    return ""


def judge(line: str, landlock: int, *, own_uid: bool) -> Found:
    """What was found, by the line in which ``emulator.c`` tells it."""
    name, _, why = line.partition(" ")
    why = why.replace("confine: ", "")
    lacks = missing(landlock, own_uid=own_uid)
    match name:
        case "full":
            return Found(walls=Walls.FULL, why=lacks)
        case "paths" if landlock:
            return Found(walls=Walls.PATHS, why=f"no namespaces ({why})")
        case "off":
            return Found(walls=Walls.PLAIN, why=confinement.PLAIN.why)
        case _:
            return Found(walls=Walls.PLAIN, why="; ".join(filter(None, (why, lacks))))
