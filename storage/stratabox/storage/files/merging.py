"""Takes RAM files that are only stood on out of their chains, so that they can go.

```
 before    child ─▶ A ─▶ B ─▶ rest      the snapshots of A and B are deleted
 write     child' holds what child, A and B hold together
 swap      child' is renamed over child; its row stands on the rest
 after     child ─▶ rest                A and B are garbage, as anything that nobody stands on
```

Killed after any step, the chain is whole by the files' own headers: before the rename it is the
old one, after it the new one. A row that still says otherwise is mended by the next `find`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from stratabox.storage.catalog import rams
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.catalog.rams import Merge
from stratabox.storage.failpoints import hit
from stratabox.storage.files import durable
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.memory.chain import OpenChain, merge, put_in_place
from stratabox.storage.files.memory.format import read_header

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A merged file that lies beside the one that it will replace."""

    merge: Merge
    own_bytes: int
    in_place: bool
    """It has replaced it already: whoever did that was killed before writing so."""


def write(layout: Layout, wanted: Merge, go_on: Callable[[], bool]) -> Written | None:
    """Write the merged file, durably. Blocks for as long as reading and writing it takes.

    :param go_on: asked again and again; once it says no, nothing is left.
    :return: None when it was not to go on.
    :raise CorruptError: RAM_CORRUPT; nothing is left, and the chain is as it was.
    :raise NoSpaceError: NO_SPACE; likewise.
    """
    ram_bytes = read_header(layout.ram_file(wanted.child)).ram_bytes
    with OpenChain(wanted.child, layout.ram_file, ram_bytes) as chain:
        if chain.files[0].parent == wanted.until:
            return Written(merge=wanted, own_bytes=chain.files[0].own_bytes, in_place=True)
        target = layout.merging(wanted.child)
        target.unlink(missing_ok=True)
        file = merge(chain, target, until=wanted.until, go_on=go_on)
    if file is None:
        return None
    return Written(merge=wanted, own_bytes=file.own_bytes, in_place=False)


def swap(layout: Layout, catalog: Catalog, written: Written) -> bool:
    """Put a merged file in place, and write that. In the catalog's thread, as sweeps are.

    Whoever reads the chain meanwhile has it all open and reads on. What left the chain is garbage
    then, which the next sweep removes.

    :return: False when the child was deleted meanwhile; nothing is left of the file then.
    """
    child = written.merge.child
    merged = layout.merging(child)
    with catalog.transaction() as tx:
        if rams.find(tx, child) is None:
            merged.unlink(missing_ok=True)
            return False
        if not written.in_place:
            hit("merge.written")
            put_in_place(merged, layout.ram_file(child))
        hit("merge.renamed")
        taken = durable.allocated_bytes(layout.ram_file(child))
        taken += durable.allocated_bytes(layout.state_file(child))
        rams.rebase(tx, child, written.merge.until, written.own_bytes, taken)
    hit("merge.recorded")
    return True
