"""Every key of the configuration, as data.

The TOML file, the environment variables, the flags, the checks, ``strataboxd config show`` and the
table in docs/configuration.md all come from `KEYS`; a new key is a row here and a field of
``config.Config``.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from stratabox.daemon.config.admission_keys import ADMISSION_KEYS
from stratabox.daemon.config.cgroup_keys import CGROUP_KEYS
from stratabox.daemon.config.key import Key, Surroundings
from stratabox.daemon.config.kinds import (
    ApiAddress,
    ApiPorts,
    Choice,
    Duration,
    Folder,
    Group,
    Integer,
    Mode,
    Size,
    Text,
)
from stratabox.daemon.config.network_kind import NetworkWish
from stratabox.daemon.config.port_kinds import Networks, Sockets
from stratabox.daemon.config.preview_kinds import DomainName, PreviewAddress
from stratabox.daemon.config.rest_kind import Endpoint, MetricsAddresses, RestAddresses
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


class ConfinementWish(StrEnum):
    """How QEMU is kept apart from the host."""

    AUTO = "auto"
    REQUIRED = "required"
    OFF = "off"


class LogLevel(StrEnum):
    """The least important message that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How the log is written."""

    TEXT = "text"
    JSON = "json"


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


def _libvirt_folder(around: Surroundings) -> str:
    if around.root:
        return "/var/cache/stratabox/libvirt"
    return str((around.xdg("XDG_CACHE_HOME") or around.home / ".cache") / "stratabox/libvirt")


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
        "Where the API listens, and where clients on this host look for it. On TCP every call "
        "takes an API key; hosts other than loopback take TLS.",
        default_doc="where `state_dir` was set: `unix://<state_dir>/api.sock`; else root: "
        "`unix:///run/stratabox/api.sock`; others: `unix://$XDG_RUNTIME_DIR/stratabox/api.sock`, "
        "else `unix://<state_dir>/api.sock`",
    ),
    Key(
        "listen",
        ApiPorts(),
        "",
        "Further TCP addresses where the API listens, beside `address`; every call there takes an "
        "API key.",
    ),
    Key(
        "endpoint",
        Endpoint(),
        "",
        "By which address clients reach the API, where it listens on all of the host's or behind a "
        "proxy; Tenki's clients are told of it. Empty: the one of its addresses that fits.",
    ),
    Key(
        "rest",
        RestAddresses(),
        "",
        "Where the REST API listens; empty: nowhere. On TCP every call takes an API key.",
    ),
    Key(
        "previews",
        PreviewAddress(),
        "",
        "Where browsers see the pages of guests whose ports are exposed, and where snapshots are "
        "downloaded; empty: nowhere. Whoever knows a preview's address may see it.",
    ),
    Key(
        "previews_domain",
        DomainName(),
        "localhost",
        "The name under which each preview has one of its own, as NAME.localhost. Another one "
        "takes a wildcard in the DNS and the certificate, and should be used for nothing else.",
    ),
    Key(
        "tls.certificate",
        Folder(optional=True),
        "",
        "File with the certificate of https addresses, PEM, and those between it and its root. "
        "Read again at SIGHUP.",
    ),
    Key(
        "tls.key",
        Folder(optional=True),
        "",
        "File with the private key of `tls.certificate`, PEM, without a passphrase.",
    ),
    Key(
        "tls.client_ca",
        Folder(optional=True),
        "",
        "File with certificates, PEM: a client must then show one that these have signed, beside "
        "its API key. Empty: clients show none.",
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
        "libvirt_folder",
        Folder(),
        _libvirt_folder,
        "Folder for the small program that libvirt runs as QEMU; QEMU's users must be able to "
        "enter it and to execute what is in it.",
        default_doc="root: `/var/cache/stratabox/libvirt`; others: "
        "`$XDG_CACHE_HOME/stratabox/libvirt`, else `~/.cache/stratabox/libvirt`",
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
        "confinement",
        Choice(ConfinementWish),
        "auto",
        "What each QEMU runs in, beside a user of its own and its own seccomp sandbox. `auto`: "
        "namespaces, Landlock and a seccomp filter, as far as this host has them; `required`: the "
        "daemon does not start where one of them is missing (with libvirt: no guest does where "
        "libvirtd's QEMU gets no namespaces); `off`: none.",
    ),
    *CGROUP_KEYS,
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
    Key(
        "warm_spares",
        Integer(0, 64),
        0,
        "QEMU processes that are kept started, each for one of the memory snapshots that were "
        "last restored, so that the next restore need not wait for its start. Each takes some "
        "30 MiB of memory.",
    ),
    *ADMISSION_KEYS,
    Key(
        "chains.max_depth",
        Integer(4, 128),
        16,
        "Layers that a backing chain may have, the image's included: longer ones are written anew "
        "in the background, so that reading stays fast.",
    ),
    Key(
        "jobs.rate",
        Size(0, 16384 * GIB),
        "256MiB",
        "Bytes a second that background jobs read and write, all together; 0: no limit.",
    ),
    Key(
        "store.budget",
        Size(0, 16384 * GIB),
        0,
        "Bytes that the state folder may take on the disk; new snapshots, sandboxes, images and "
        "volumes are refused beyond (BUDGET_EXCEEDED). 0: no limit.",
    ),
    Key(
        "store.high_water",
        Integer(1, 100, "per cent"),
        97,
        "How full the state folder's file system may be until the same are refused, so that "
        "running guests have what is left.",
    ),
    Key(
        "backups.every",
        Duration(60, 366 * 24 * _HOUR),
        "1h",
        "How often the catalog is backed up, if it has changed.",
    ),
    Key("backups.keep", Integer(1, 1000), 24, "How many backups of the catalog are kept."),
    Key(
        "console.rate",
        Size(1024, 64 * MIB),
        "16KiB",
        "Bytes a second that a guest may write to its serial console, after a burst of 256 KiB; "
        "one that writes more waits, as for a serial line.",
    ),
    Key(
        "console.log",
        Size(128 << 10, GIB),
        "512KiB",
        "Bytes of each sandbox's serial console that are kept: the newest.",
    ),
    Key(
        "ports.addresses",
        Networks(),
        "",
        "Addresses beside loopback that forwarded ports may listen on at the host, and lead to; "
        "where the API has an address that other hosts reach, loopback is led to only if it is "
        "named, too. "
        'To listen on all addresses takes "0.0.0.0". Whoever reaches the port reaches the guest.',
    ),
    Key(
        "ports.sockets",
        Sockets(),
        "auto",
        "Folders in which forwarded ports may make Unix sockets at the host, and reach them, as "
        "the daemon's user. `auto`: `any`, but `none` where the API has a TCP address, a group or "
        "a mode by which others than the daemon's own user and group can use it.",
    ),
    Key(
        "network",
        NetworkWish(),
        "none",
        "What new sandboxes may reach, where neither the request nor the snapshot says.",
    ),
    Key(
        "limits.rate",
        Integer(0, 1_000_000, "calls a second"),
        200,
        "Calls that each API key may make a second, over a long time; more are refused "
        "(RATE_LIMITED). 0: no limit. The Unix socket has none.",
    ),
    Key(
        "limits.burst",
        Integer(1, 1_000_000, "calls"),
        400,
        "Calls that each API key may make at once, after a while without.",
    ),
    Key(
        "limits.open",
        Integer(0, 100_000, "calls"),
        256,
        "Calls of each API key that may be under way at a time, streams among them "
        "(TOO_MANY_CALLS). 0: no limit.",
    ),
    Key(
        "keepalive",
        Duration(1, _HOUR),
        "60s",
        "How long a TCP connection may say nothing before its client is asked for a sign of life. "
        "One that gives none for as long again, 20 s at most, is gone, and its calls end.",
    ),
    Key(
        "audit.size",
        Size(0, 1024 * GIB),
        "64MiB",
        "Bytes that the audit log of all calls may take in the state folder; the oldest go. 0: "
        "none is kept.",
    ),
    Key(
        "metrics",
        MetricsAddresses(),
        "",
        "Where `GET /metrics` answers with figures for Prometheus. On loopback and by a Unix "
        "socket it takes no key; elsewhere an API key of the workspace default, and TLS.",
    ),
    Key("log_level", Choice(LogLevel), "info", "The least important message that is logged."),
    Key(
        "log_format",
        Choice(LogFormat),
        "text",
        "How the log is written: lines for people, or a JSON object a line.",
    ),
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


def example() -> str:
    """A configuration file with every key at its default, as a comment."""
    head = (
        "# Settings of strataboxd; stratabox.toml(5) tells of each. Those below are the defaults."
    )
    rows = [head]
    for key in KEYS:
        value = f"# {key.default_doc}".replace("`", "")
        if not callable(key.default):
            value = key.kind.toml(key.kind.parse(key.default))
        rows.append(f"#{key.name} = {value}")
    return "\n".join(rows) + "\n"
