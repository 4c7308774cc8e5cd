"""Every key of the configuration, as data.

The TOML file, the environment variables, the flags, the checks, ``strataboxd config show`` and the
table in docs/configuration.md all come from `KEYS`; a new key is a row here and a field of
``config.Config``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from stratabox.daemon.config.kinds import (
    ApiAddress,
    Choice,
    Duration,
    Folder,
    Group,
    Integer,
    Kind,
    Mode,
    Size,
    Text,
)
from stratabox.storage.model.records import GIB, MIB
from stratabox.storage.model.states import Level

SYSTEM_CONFIG = Path("/etc/stratabox/config.toml")
UID_COUNT = 65536
"""Host uids from ``uid_base`` on that belong to QEMU processes."""


class LauncherName(StrEnum):
    """What starts guests."""

    QEMU = "qemu"
    LIBVIRT = "libvirt"


class AcceleratorWish(StrEnum):
    """What runs the guests' instructions."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class LogLevel(StrEnum):
    """The least important message that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


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
    def variable(self) -> str:
        """Its environment variable."""
        return f"STRATABOX_{self.name.upper()}"

    @property
    def flag(self) -> str:
        """Its flag on the command line."""
        return f"--{self.name.replace('_', '-')}"

    def default_for(self, around: Surroundings) -> str | int:
        """Compute the default, as it would be written in the file."""
        return self.default(around) if callable(self.default) else self.default


def default_file(around: Surroundings) -> Path:
    """Where the configuration is looked for when nobody names a file."""
    if around.root:
        return SYSTEM_CONFIG
    return (around.xdg("XDG_CONFIG_HOME") or around.home / ".config") / "stratabox/config.toml"


def _state_dir(around: Surroundings) -> str:
    if around.root:
        return "/var/lib/stratabox"
    return str((around.xdg("XDG_DATA_HOME") or around.home / ".local/share") / "stratabox")


def _address(around: Surroundings) -> str:
    runtime = around.xdg("XDG_RUNTIME_DIR")
    if around.state_dir_was_set:
        folder = str(around.state_dir)
    elif around.root:
        folder = "/run/stratabox"
    elif runtime:
        folder = f"{runtime}/stratabox"
    else:
        folder = str(around.state_dir)
    return f"unix://{folder}/api.sock"


def _libvirt_uri(around: Surroundings) -> str:
    return "qemu:///system" if around.root else "qemu:///session"


_HOUR = 3600.0

# state_dir comes first: the default address depends on it.
KEYS: tuple[Key, ...] = (
    Key(
        "state_dir",
        Folder(),
        _state_dir,
        "Folder with everything that the daemon keeps: catalog, layers, images. One daemon a "
        "folder.",
        default_doc="root: `/var/lib/stratabox`; others: `$XDG_DATA_HOME/stratabox`, else "
        "`~/.local/share/stratabox`",
    ),
    Key(
        "address",
        ApiAddress(),
        _address,
        "Where the API listens. TCP takes loopback hosts only until there are TLS and keys.",
        default_doc="where `state_dir` was set: `unix://<state_dir>/api.sock`; else root: "
        "`unix:///run/stratabox/api.sock`; others: `unix://$XDG_RUNTIME_DIR/stratabox/api.sock`, "
        "else `unix://<state_dir>/api.sock`",
    ),
    Key("socket_mode", Mode(), "0660", "Permissions of the API's Unix socket."),
    Key(
        "socket_group",
        Group(),
        "",
        "Group that owns the API's Unix socket; empty: the daemon's own. Whoever may write to the "
        "socket commands every sandbox.",
    ),
    Key(
        "launcher",
        Choice(LauncherName),
        "qemu",
        "What starts guests: QEMU as a child process, or a libvirt domain.",
    ),
    Key(
        "libvirt_uri",
        Text('a URI of this host\'s libvirt, as "qemu:///system"', r"qemu(\+unix)?:///.+"),
        _libvirt_uri,
        'libvirt connection, for `launcher = "libvirt"`. Local ones only: guests\' files are '
        "opened by the daemon.",
        default_doc="root: `qemu:///system`; others: `qemu:///session`",
    ),
    Key(
        "accel",
        Choice(AcceleratorWish),
        "auto",
        "What runs guests' instructions. `auto` takes KVM where it really runs a guest, else TCG, "
        "with a warning.",
    ),
    Key(
        "qemu_binary",
        Text("a command on PATH, or an absolute path", r"[^/]+|/.+"),
        "qemu-system-x86_64",
        "The QEMU to run.",
    ),
    Key(
        "default_image",
        Text("the name or id of an image", r".{1,255}", optional=True),
        "",
        "Image that new sandboxes start from when the request names none.",
    ),
    Key(
        "default_level",
        Choice(Level),
        "application",
        "Snapshot level when the request names none; a sandbox whose state does not allow it gets "
        "the strongest one that it does allow.",
    ),
    Key("default_cpus", Integer(1, 32), 1, "CPUs of a new sandbox."),
    Key("default_memory", Integer(128, 32768, "MiB"), 512, "Memory of a new sandbox, MiB."),
    Key(
        "default_storage",
        Integer(0, 16384, "GiB"),
        0,
        "Root disk of a new sandbox, GiB; 0: the image's own size.",
    ),
    Key(
        "ready_timeout",
        Duration(1, 24 * _HOUR),
        "180s",
        "How long a started guest may take until its agent answers.",
    ),
    Key(
        "stop_timeout",
        Duration(0, 24 * _HOUR),
        "60s",
        "How long an orderly shutdown may take before the guest is ended.",
    ),
    Key(
        "freeze_timeout",
        Duration(1, _HOUR),
        "30s",
        "How long a guest may take to freeze its file systems before they are thawed again and "
        "the snapshot fails.",
    ),
    # Clear of what usual tools hand out: login and service users (< 65536), subuids (100000 to
    # 600100000), systemd-nspawn (524288 to 1879048191), LXD and Incus (1000000 to 1001000000),
    # SSSD and FreeIPA (200000 to 2000200000), systemd's foreign ids (2147352576 on). Numbers past
    # 2^31 break programs that take a uid for a signed integer.
    Key(
        "uid_base",
        Integer(65536, 0x7FFE0000 - UID_COUNT),
        0x78000000,
        f"First of {UID_COUNT} host uids (and gids) that QEMU processes run under, one for each "
        "sandbox, when the daemon is root. Nobody else may use them.",
    ),
    Key(
        "build_cache",
        Folder(optional=True),
        "",
        "Folder that keeps built images, to be taken again by the next build of the same recipe; "
        "empty: none.",
    ),
    Key(
        "max_image_bytes",
        Size(MIB, 16384 * GIB),
        "64GiB",
        "Largest virtual size of an image that may be imported.",
    ),
    Key(
        "memory_cache",
        Size(0, 16384 * GIB),
        "2GiB",
        "Memory of snapshots that is kept ready to be mapped while nobody starts from it; the rest "
        "is assembled again at the next restore.",
    ),
    Key("log_level", Choice(LogLevel), "info", "The least important message that is logged."),
    Key(
        "idempotency_hours",
        Integer(1, 8760, "hours"),
        24,
        "How long the outcome of a request with an idempotency key is kept, hours.",
    ),
)


def markdown_table() -> str:
    """Write the table of keys for docs/configuration.md."""
    rows = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key in KEYS:
        default = key.default_doc
        if not callable(key.default):
            default = f"`{key.kind.toml(key.kind.parse(key.default))}`"
        cells = (f"`{key.name}`", key.kind.allowed, default, key.doc)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"
