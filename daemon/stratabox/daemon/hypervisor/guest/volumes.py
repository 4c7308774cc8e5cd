"""What a guest does for its volumes: mounts, grows and lets go of them, through its agent.

A volume is found by its place on the bus and recognised by its serial, which the kernel reads when
the disk comes (`vpd_pg80`): the place may hold another volume than a moment ago. All scripts need a
POSIX shell, `mount` and `umount`; `resize2fs` only where something has grown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stratabox.daemon.hypervisor.command_line import VOLUMES_SLOT
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.guest.exec import execute
from stratabox.storage.model.errors import FailedError

MOUNT_SECONDS = 60.0
"""How long a guest may take to see a disk and mount it; growing it comes on top."""
GROW_SECONDS = 300.0
UNMOUNT_SECONDS = 60.0

_NO_DISK, _NO_FOLDER, _NOT_MOUNTED, _NOT_GROWN, _BUSY = 10, 11, 12, 13, 14
_WORDS = 500

# $1: slot, $2: serial ("": whatever is there). Escapes of /proc/mounts are octal; a path of ours
# can hold no other than that of a blank.
_COMMON = f"""\
slot=$1 serial=$2 bus=/sys/bus/pci/devices/0000:00:{VOLUMES_SLOT:02x}.0
find_disk() {{
    for at in "$bus"/virtio*/host*/target*:0:"$slot"/*/block/*; do
        [ -b "/dev/${{at##*/}}" ] || return 1
        page=
        {{ read -r page <"${{at%/block/*}}/vpd_pg80"; }} 2>/dev/null
        case $page in *"$serial"*) disk=/dev/${{at##*/}} && return ;; esac
    done
    return 1
}}
find_point() {{ # where it was mounted last
    point=
    while read -r device place rest; do
        [ "$device" != "$disk" ] || point=$place
    done </proc/mounts
    [ -n "$point" ] || return 1
    point=$(printf '%b.' "$point") && point=${{point%.}}
}}
forget() {{ # the disk, before it goes: its cache is written, and nothing waits for it any more
    echo 1 >"/sys/block/${{disk##*/}}/device/delete"
}}
wait_for() {{ # a condition, 20 s or more
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 400 ] || return 1
        sleep 0.05 2>/dev/null || sleep 1
    done
}}
"""

_MOUNT = (
    _COMMON
    + f"""\
path=$3 options=$4 sectors=$5
if ! find_disk && command -v modprobe >/dev/null; then
    modprobe -aq virtio_scsi sd_mod 2>/dev/null # the guest may not have come to it yet
fi
wait_for find_disk || exit {_NO_DISK}
is_large() {{ read -r now <"/sys/block/${{disk##*/}}/size" && [ "$now" -ge "$sectors" ]; }}
wait_for is_large || exit {_NO_DISK}
if ! find_point || [ "$point" != "$path" ]; then
    mkdir -p "$path" || exit {_NO_FOLDER}
    mount -t ext4 -o "$options" "$disk" "$path" || exit {_NOT_MOUNTED}
fi
[ -z "$6" ] || resize2fs "$disk" >/dev/null || exit {_NOT_GROWN}
"""
)

_UNMOUNT = (
    _COMMON
    + f"""\
who() {{
    ls -l /proc/[0-9]*/cwd /proc/[0-9]*/exe /proc/[0-9]*/fd/ 2>/dev/null |
        while IFS= read -r line; do
            case $line in
            /proc/*:) pid=${{line#/proc/}} pid=${{pid%%/*}} && continue ;;
            *" /proc/"*" -> $point" | *" /proc/"*" -> $point/"*)
                holder=${{line#* /proc/}} holder=${{holder%%/*}} ;;
            *" -> $point" | *" -> $point/"*) holder=$pid ;;
            *) continue ;;
            esac
            [ "$holder" != "$last" ] || continue
            last=$holder name=
            {{ read -r name <"/proc/$holder/comm"; }} 2>/dev/null
            echo "$holder ($name)"
        done | sort -u | head -n 8
}}
find_disk || exit 0
while find_point; do
    umount "$point" 2>/dev/null && continue
    find_point || break
    who >&2
    exit {_BUSY}
done
for holder in "/sys/block/${{disk##*/}}/holders"/*; do
    [ ! -e "$holder" ] || {{ echo "it is part of ${{holder##*/}}" >&2 && exit {_BUSY}; }}
done
forget
"""
)

# $1, $2 …: slots.
_LEAVE = (
    _COMMON
    + """\
serial=
for slot; do
    find_disk || continue
    while find_point; do umount -l "$point" || exit 1; done
    forget
done
"""
)

_HOLDER = re.compile(r"\d+ \([^()]*\)")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A volume on a guest's bus, and where it is to be in its tree."""

    slot: int
    serial: str
    path: str
    read_only: bool
    size: int
    """Bytes that the disk has at least."""


async def mount(agent: GuestAgent, place: Place, *, grow: bool) -> None:
    """Have a volume mounted, where it is not yet; and its file system grown to its disk.

    :raise FailedError: VOLUME_MOUNT_FAILED or VOLUME_GROW_FAILED, with the guest's own words.
    :raise UnavailableError: AGENT_UNAVAILABLE.
    """
    # noinit_itable: what mke2fs left out reads as zeros already, and need not be written.
    options = "ro,relatime" if place.read_only else "rw,relatime,noinit_itable"
    done = await _run(
        agent,
        _MOUNT,
        [str(place.slot), place.serial, place.path, options, str(place.size // 512),
         "grow" if grow else ""],
        MOUNT_SECONDS + (GROW_SECONDS if grow else 0),
    )  # fmt: skip
    if done.code == 0:
        return
    if done.code == _NOT_GROWN:
        raise FailedError(
            f"the disk has grown, and the guest's file system at {place.path} has not:"
            f" {done.words}; it is tried again when it is mounted the next time",
            reason="VOLUME_GROW_FAILED",
        )
    what = {
        None: "the guest took too long",
        _NO_DISK: "the guest does not see the disk: it needs a driver for virtio-scsi",
        _NO_FOLDER: f"the guest cannot make the folder: {done.words}",
    }.get(done.code, done.words)
    raise FailedError(
        f"it could not be mounted at {place.path} in the guest: {what}",
        reason="VOLUME_MOUNT_FAILED",
    )


async def unmount(agent: GuestAgent, slot: int, serial: str) -> None:
    """Have a volume unmounted everywhere; it is all on its disk then. Not mounted: fine.

    :raise FailedError: VOLUME_BUSY, with the processes that use it; where there are several mounts
        of it, some may be gone by then.
    :raise UnavailableError: AGENT_UNAVAILABLE.
    """
    done = await _run(agent, _UNMOUNT, [str(slot), serial], UNMOUNT_SECONDS)
    if done.code == 0:
        return
    holders = _HOLDER.findall(done.words)
    what = f"in use by {', '.join(holders)}" if holders else done.words
    if done.code is None:
        what = "the guest took too long to write what it held"
    raise FailedError(
        f"the guest does not let go of it: {what}",
        reason="VOLUME_BUSY",
        processes=", ".join(holders),
    )


async def leave(agent: GuestAgent, slots: Sequence[int]) -> None:
    """Have whatever is in these slots unmounted at once, used or not: nothing of it is kept.

    :raise FailedError: VOLUME_BUSY.
    :raise UnavailableError: AGENT_UNAVAILABLE.
    """
    done = await _run(agent, _LEAVE, [str(slot) for slot in slots], UNMOUNT_SECONDS)
    if done.code != 0:
        raise FailedError(
            f"the guest does not let go of the volumes of its source: {done.words}",
            reason="VOLUME_BUSY",
        )


@dataclass(frozen=True)
class _Done:
    code: int | None
    words: str


async def _run(agent: GuestAgent, script: str, arguments: Sequence[str], seconds: float) -> _Done:
    result = await execute(agent, ["/bin/sh", "-c", script, "sh", *arguments], timeout=seconds)
    words = result.stderr.decode(errors="replace").strip()[-_WORDS:]
    return _Done(None if result.timed_out else result.exit_code, words or "it said nothing")
