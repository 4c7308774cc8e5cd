"""What may go: pure decisions about layers and blobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stratabox.storage.model.ids import LayerId


def reachable(roots: Iterable[LayerId], parents: Mapping[LayerId, LayerId | None]) -> set[LayerId]:
    """Every layer that some root stands on, the roots included."""
    seen: set[LayerId] = set()
    for root in roots:
        layer: LayerId | None = root
        while layer is not None and layer not in seen:
            seen.add(layer)
            layer = parents.get(layer)
    return seen


def garbage(roots: Iterable[LayerId], parents: Mapping[LayerId, LayerId | None]) -> set[LayerId]:
    """Every layer that no root needs."""
    return set(parents) - reachable(roots, parents)


def freed_by_removing(
    removed: Iterable[LayerId],
    roots: Iterable[LayerId],
    parents: Mapping[LayerId, LayerId | None],
) -> tuple[set[LayerId], set[LayerId]]:
    """What goes and what stays of the chains of `removed`, when only `roots` remain.

    An image's own layers are among `roots`, so they always stay.
    """
    mine = reachable(removed, parents)
    needed = reachable(roots, parents)
    return mine - needed, mine & needed
