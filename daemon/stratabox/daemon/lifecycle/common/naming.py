"""Names for things that were given none."""

from __future__ import annotations

import secrets

_FIRST = (
    "amber", "basalt", "bright", "calm", "chalky", "clear", "cobalt", "coral", "dusty", "early",
    "faint", "flint", "golden", "granite", "green", "grey", "hidden", "ivory", "jade", "late",
    "layered", "marble", "mellow", "mossy", "ochre", "pale", "quiet", "red", "rusty", "sandy",
    "silent", "silver", "slate", "steep", "still", "tidal", "umber", "violet", "warm", "white",
)  # fmt: skip
_SECOND = (
    "bay", "bluff", "brook", "canyon", "cave", "cliff", "cove", "creek", "delta", "dune", "fen",
    "field", "fjord", "ford", "gorge", "grove", "harbor", "hill", "inlet", "island", "lagoon",
    "lake", "ledge", "marsh", "meadow", "mesa", "moor", "peak", "pond", "quarry", "reef", "ridge",
    "river", "shoal", "shore", "spring", "summit", "terrace", "valley", "vein",
)  # fmt: skip


def make_up() -> str:
    """A name that is easy to say, and rarely the same twice: 160 million of them."""
    number = secrets.randbelow(100_000)
    return f"{secrets.choice(_FIRST)}-{secrets.choice(_SECOND)}-{number:05d}"
