"""What the calls are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from stratabox.daemon.access.credentials import Credentials
from stratabox.daemon.access.links import Links
from stratabox.daemon.lifecycle.clones import Clones
from stratabox.daemon.lifecycle.inside.callers import Callers
from stratabox.daemon.lifecycle.inside.commands import Commands
from stratabox.daemon.lifecycle.inside.files import Files
from stratabox.daemon.lifecycle.inside.previews import Previews
from stratabox.daemon.lifecycle.observing.history import History
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.sandboxes import Sandboxes
from stratabox.daemon.lifecycle.snapshots import Snapshots
from stratabox.daemon.lifecycle.volumes.volumes import Volumes
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.model.ids import SandboxId


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The use cases, put together by ``app``."""

    world: World
    guests: Guests
    sandboxes: Sandboxes
    snapshots: Snapshots
    volumes: Volumes
    clones: Clones
    commands: Commands
    files: Files
    callers: Callers
    history: History
    credentials: Credentials
    previews: Previews
    links: Links
    pausing: set[SandboxId] = field(default_factory=set)
    """Sessions whose pause is under way."""
