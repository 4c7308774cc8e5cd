"""Named places where a test can make the daemon die, wait or fail.

Every step of every operation that changes the world calls :func:`hit` with a name from `NAMES`.
In production this is one dictionary look-up in an empty dictionary. A test sets
``STRATABOX_FAILPOINTS="snapshot.overlays-made=kill,restore.row-written=error"``:

``kill``
    SIGKILL to the own process: nothing is flushed, no handler runs.
``kill:N``
    the same, at the Nth time that it is reached.
``error``
    raise OSError(EIO), as a failing disk would.
``nospace``
    raise OSError(ENOSPC), as a full disk would.
``error:N``, ``nospace:N``
    the first N times only: what is tried again then goes well.
``sleep:SECONDS``
    wait (in a thread or before the event loop goes on), to widen a race.
``hold:PATH``
    stand still, the first time: an empty file at PATH (absolute) says that it was reached, and it
    goes on once somebody has removed that.

The names are listed so that one test can go through all of them; hitting a name that is not
listed is an error in our own code.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path

ENVIRONMENT = "STRATABOX_FAILPOINTS"

NAMES: tuple[str, ...] = ()
"""Every failpoint; filled in below, grouped by operation."""

_armed: dict[str, str] = {}
_ACTION = re.compile(
    r"kill(:[1-9][0-9]*)?|(error|nospace)(:[1-9][0-9]*)?|sleep:[0-9]+(\.[0-9]+)?|hold:/.+"
)
_LOOK_SECONDS = 0.01
_ERRORS = {"error": errno.EIO, "nospace": errno.ENOSPC}


def arm(text: str) -> None:
    """Set the failpoints from the text of the environment variable.

    :raise ValueError: for a name that does not exist or an action that is not known; what was
        armed before stays so.
    """
    actions = {}
    for part in filter(None, text.split(",")):
        name, _, action = part.partition("=")
        if name not in NAMES:
            raise ValueError(f"{ENVIRONMENT}: there is no failpoint {name!r}")
        if not _ACTION.fullmatch(action):
            raise ValueError(f"{ENVIRONMENT}: no such action {action!r}")
        actions[name] = action
    _armed.clear()
    _armed.update(actions)


def hit(name: str) -> None:
    """Do what is armed at `name`; nothing, as a rule.

    :raise OSError: when `error` or `nospace` is armed here.
    """
    action, _, argument = _armed.get(name, "").partition(":")
    if not action:
        return
    if action == "kill" and argument in ("", "1"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "kill":
        _armed[name] = f"{action}:{int(argument) - 1}"
    elif action == "sleep":
        time.sleep(float(argument))
    elif action == "hold":
        del _armed[name]
        _hold(Path(argument))
    else:
        if argument == "1":
            del _armed[name]
        elif argument:
            _armed[name] = f"{action}:{int(argument) - 1}"
        raise OSError(_ERRORS[action], f"failpoint {name}")


def _hold(mark: Path) -> None:
    mark.touch()
    while mark.exists():
        time.sleep(_LOOK_SECONDS)


NAMES += (
    "create.row-written",
    "create.overlays-made",
    "boot.started",
    "boot.running-written",
    "identity.told",
    "spare.overlays-made",
    "spare.loaded",
    "snapshot.row-written",
    "snapshot.overlays-made",
    "snapshot.freeze-intended",
    "snapshot.frozen",
    "snapshot.freeze-counted",
    "snapshot.switched",
    "snapshot.memory-saved",
    "snapshot.thawed",
    "snapshot.sealed",
    "snapshot.ready-written",
    "clone.snapshot-taken",
    "clone.copies-made",
    "delete-snapshot.row-written",
    "farewell.snapshot-taken",
    "terminate.row-written",
    "terminate.stopped",
    "terminate.disks-released",
    "delete-sandbox.row-removed",
    "stop.stopped",
    "pause.stopped",
    "resume.continued",
    "park.row-written",
    "park.stopped",
    "park.saved",
    "park.written",
    "park.ended",
    "revert.row-written",
    "revert.stopped",
    "revert.overlays-made",
    "revert.disks-switched",
    "image.row-written",
    "image.built",
    "image.files-stored",
    "image.ready-written",
    "delete-image.row-written",
    "import.row-written",
    "import.received",
    "import.files-stored",
    "import.ready-written",
    "volume.row-written",
    "volume.formatted",
    "volume.stored",
    "volume.ready-written",
    "delete-volume.row-removed",
    "volume.claimed",
    "volume.plugged",
    "volume.mounted",
    "volume.attached-written",
    "volume.detach-intended",
    "volume.unmounted",
    "volume.unplugged",
    "volume.released",
    "volume.left",
    "volume.grown",
    "volume.grown-written",
    "volume-snapshot.row-written",
    "volume-snapshot.overlays-made",
    "volume-snapshot.frozen",
    "volume-snapshot.switched",
    "volume-snapshot.sealed",
    "volume-snapshot.written",
    "delete-volume-snapshot.row-removed",
    "merge.written",
    "merge.renamed",
    "merge.recorded",
    "jobs.target-made",
    "jobs.written",
    "jobs.compared",
    "jobs.replacement-written",
    "jobs.replaced",
    "jobs.taken-over",
    "sweep.tombstoned",
    "sweep.unlinked",
    "catalog.commit",
    "catalog.committed",
    "backup.written",
    "backup.placed",
    "restore-catalog.moved",
    "restore-catalog.placed",
    "quarantine.moved",
)
