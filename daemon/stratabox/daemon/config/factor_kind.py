"""The kind of value that says how many times something may be given away."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Factor:
    """How many times something may be given away; 0: as often as one likes."""

    high: int

    @property
    def allowed(self) -> str:
        """The limits."""
        return f"0 to {self.high}, with fractions"

    def parse(self, raw: object) -> float:
        """Read it."""
        if isinstance(raw, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", raw):
            raw = float(raw)
        if isinstance(raw, bool) or not isinstance(raw, int | float):
            raise ValueError("it must be a number")
        if not 0 <= raw <= self.high:  # nor what is no number
            raise ValueError
        return float(raw)

    def toml(self, value: object) -> str:
        """Write it."""
        return f"{value:g}"
