"""The blocking part of a job: a new layer is written, compared with the old ones, and put in place.

```
 write         compare               durable              catalog
 ──────────────┬─────────────────────┬────────────────────┬──────────────────▶ takeover
   stopped: what is written is kept, │ killed: the target │ killed: the rest is done
   and goes on                       │ has no row, and is removed at the start
```

All in a thread of low priority, but for the transaction.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from stratabox.daemon.lifecycle.chains.rate import Rate
from stratabox.storage.failpoints import hit
from stratabox.storage.files import durable
from stratabox.storage.files.layout import Layout
from stratabox.storage.model.errors import NoSpaceError
from stratabox.storage.model.records import MIB, Job, Layer
from stratabox.storage.model.states import JobKind
from stratabox.storage.qcow2.comparing import compare
from stratabox.storage.qcow2.rewrite import Rewrite, open_all

_LEFT_BYTES = 32 * MIB
_LEFT_PART = 100
"""What is left to running guests: so much at least, and a part of the disk."""


class Writing:
    """One job's new layer, as far as it is. `begin` it in the thread that `run`s it.

    :param made_of: the layers that are put together, the topmost first.
    """

    def __init__(self, layout: Layout, job: Job, made_of: Sequence[Layer]) -> None:
        self.job, self.made_of = job, made_of
        self.stop = threading.Event()
        """Set: `run` returns soon."""
        self.written = False
        self.compared = False
        self.is_offered = False
        """The catalog was asked to have the new layer, and may have it. A file that is in doubt
        stays; where it has no row, the next start removes it."""
        self._layout = layout
        self._rewrite: Rewrite | None = None

    @property
    def target(self) -> Path:
        """The new layer's file."""
        return self._layout.layer(self.job.target)

    @property
    def done(self) -> int:
        """Bytes copied."""
        return self._rewrite.done if self._rewrite else 0

    @property
    def total(self) -> int:
        """Bytes to copy; 0: not known yet."""
        return self._rewrite.total if self._rewrite else 0

    @property
    def compressed(self) -> bool:
        """All of the new layer is compressed that is worth it: by request, which goes on to hold
        when it is merged; there may be compressed clusters in others, too."""
        return self.job.kind is JobKind.COMPACT or self.made_of[0].compressed

    @property
    def bytes(self) -> int:
        """What the new layer takes on the disk."""
        return durable.allocated_bytes(self.target)

    def begin(self) -> None:
        """Open the old layers and look at what there is to copy.

        :raise CorruptError: LAYER_MISSING, LAYER_CORRUPT.
        :raise DeniedError: LAYER_UNFIT.
        :raise NoSpaceError: NO_SPACE.
        """
        with durable.naming_a_full_disk():
            self._begin()

    def _begin(self) -> None:
        base = self.job.base
        sources = open_all([(self._layout.layer(each.id), each.size) for each in self.made_of])
        try:
            self._rewrite = Rewrite(
                sources,
                self.target,
                backing_name=base and self._layout.layer_name(base),
                compress=self.compressed,
            )
        except BaseException:
            for source in sources:
                source.close()
            raise
        hit("jobs.target-made")
        _check_room(self.target, self.total)

    def run(self, rate: Rate) -> bool:
        """Write and compare until that is done, or until `stop` is set; then `run` goes on.

        On True the new layer is durable and right.

        :raise CorruptError: LAYER_CORRUPT, when a layer cannot be read, or the new one is not
            what it must be.
        :raise NoSpaceError: NO_SPACE.
        :raise OSError: when the disk fails.
        """
        rewrite = self._rewrite
        assert rewrite is not None
        with durable.naming_a_full_disk():
            if not self.written:
                if not rewrite.run(lambda size: rate.take(size, self.stop)):
                    return False
                rewrite.finish()
                durable.sync_folder(self._layout.layers)
                self.written = True
                hit("jobs.written")
            if not self.compared:
                old = [self._layout.layer(each.id) for each in self.made_of]
                on_base = self.job.base is not None
                go_on = self._goes_on
                if not compare(self.target, old, go_on, on_base=on_base):
                    return False
                self.compared = True
                hit("jobs.compared")
        return not self.stop.is_set()

    def close(self) -> None:
        """Let go of the files, and remove the new layer unless it is offered. May be repeated."""
        if self._rewrite is not None:
            self._rewrite.close()
        if not self.is_offered:
            self.target.unlink(missing_ok=True)

    def _goes_on(self) -> bool:
        return not self.stop.is_set()


def _check_room(target: Path, size: int) -> None:
    """:raise NoSpaceError: NO_SPACE, when running guests would not have enough left."""
    found = os.statvfs(target)
    left = found.f_bavail * found.f_frsize - size
    if left < max(_LEFT_BYTES, found.f_blocks * found.f_frsize // _LEFT_PART):
        raise NoSpaceError(
            f"{size >> 20} MiB are to be written, and the host's disk would be too full with them:"
            " free some space"
        )
