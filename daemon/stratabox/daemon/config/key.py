"""What a key of the configuration is; what keys there are is told by ``config.keys``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stratabox.daemon.config.kinds import Kind


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a computed default may look at."""

    root: bool
    environ: Mapping[str, str]
    home: Path
    state_dir: Path | None = None
    state_dir_was_set: bool = False

    def xdg(self, name: str) -> Path | None:
        """One of the XDG base folders; relative ones count as unset, as the XDG standard says."""
        path = Path(self.environ.get(name, ""))
        return path if path.is_absolute() else None


@dataclass(frozen=True)
class Key:
    """One key: its name in the TOML file, what it may be, and what it means."""

    name: str
    kind: Kind
    default: str | int | Callable[[Surroundings], str]
    doc: str
    default_doc: str = field(default="", kw_only=True)
    """The default in words, where it is computed."""

    @property
    def field(self) -> str:
        """Its attribute of ``Config``. In the file, a dot leads into a table."""
        return self.name.replace(".", "_")

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"STRATABOX_{self.field.upper()}"

    @property
    def flag(self) -> str:
        """Its flag on the command line."""
        return f"--{self.field.replace('_', '-')}"

    def default_for(self, around: Surroundings) -> str | int:
        """Compute the default, as it would be written in the file."""
        return self.default(around) if callable(self.default) else self.default
