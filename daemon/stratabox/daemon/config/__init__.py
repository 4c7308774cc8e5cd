"""The daemon's configuration: one TOML file, the environment, flags; checked before anything runs.

A flag beats an environment variable, that beats the file, that beats the default. Each value
remembers where it came from. `load` is the only way to make a `Config`; what keys there are is
told by ``config.keys``.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from stratabox.daemon.config.admission_keys import SwapWish
from stratabox.daemon.config.cgroup_keys import LimitsWish
from stratabox.daemon.config.key import Key, Surroundings
from stratabox.daemon.config.keys import (
    KEYS,
    AcceleratorWish,
    ConfinementWish,
    LauncherName,
    LogFormat,
    LogLevel,
    default_file,
)
from stratabox.daemon.config.kinds import Address, TcpAddress
from stratabox.daemon.config.port_kinds import Network, SocketFolders, SocketsWish
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.network import Network as NetworkPolicy
from stratabox.storage.model.states import Level

REASON = "INVALID_CONFIG"
DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key in force: its value as TOML, and where that came from.

    `source` is "default", "file PATH", "environment NAME" or "flag --NAME".
    """

    key: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration in force. Durations are seconds; ``config.keys`` tells of each key."""

    state_dir: Path
    address: Address
    listen: tuple[TcpAddress, ...]
    endpoint: TcpAddress | None
    """By which clients reach the API; None: by one of its addresses."""
    rest: tuple[Address, ...]
    previews: TcpAddress | None
    previews_domain: str
    tls_certificate: Path | None
    tls_key: Path | None
    tls_client_ca: Path | None
    socket_mode: int
    socket_group: str | None
    launcher: LauncherName
    libvirt_folder: Path
    libvirt_uri: str
    accel: AcceleratorWish
    qemu_binary: str
    default_image: str | None
    default_level: Level
    default_cpus: int
    default_memory: int
    """MiB."""
    default_storage: int
    """GiB; 0: the image's own size."""
    ready_timeout: float
    stop_timeout: float
    freeze_timeout: float
    uid_base: int
    confinement: ConfinementWish
    cgroups_limits: LimitsWish
    cgroups_folder: Path | None
    cgroups_memory_overhead: int
    """Bytes."""
    cgroups_cpu_overhead: int
    """Per cent of a CPU."""
    cgroups_pids: int
    cgroups_io_weight: int
    """0: not set."""
    cgroups_io_read_bandwidth: int
    """Bytes a second; 0: no limit."""
    cgroups_io_write_bandwidth: int
    cgroups_io_read_iops: int
    """A second; 0: no limit."""
    cgroups_io_write_iops: int
    build_cache: Path | None
    max_image_bytes: int
    memory_cache: int
    warm_spares: int
    admission_memory: int
    """Bytes; 0: no limit."""
    admission_memory_overcommit: float
    """0: no limit."""
    admission_memory_reserve: int
    """Bytes."""
    admission_swap: SwapWish
    admission_cpu_overcommit: float
    """0: no limit."""
    admission_sandboxes: int
    """0: no limit."""
    admission_disk_overcommit: float
    """0: no limit."""
    admission_disk_reserve: int
    """Bytes."""
    chains_max_depth: int
    """Layers, the image's included."""
    jobs_rate: int
    """Bytes a second; 0: no limit."""
    store_budget: int
    """Bytes; 0: no limit."""
    store_high_water: int
    """Per cent of the file system."""
    backups_every: float
    backups_keep: int
    console_rate: int
    """Bytes a second."""
    console_log: int
    """Bytes of each sandbox's console that are kept."""
    ports_addresses: tuple[Network, ...]
    ports_sockets: SocketsWish | SocketFolders
    network: NetworkPolicy
    """Of new sandboxes whose request names none."""
    limits_rate: int
    limits_burst: int
    limits_open: int
    keepalive: float
    audit_size: int
    """Bytes; 0: none."""
    metrics: tuple[Address, ...]
    log_level: LogLevel
    log_format: LogFormat
    idempotency_hours: int
    sources: Mapping[str, str] = field(repr=False)
    """Key → where its value came from."""

    @property
    def ports(self) -> tuple[TcpAddress, ...]:
        """Every TCP address where the API listens."""
        first = (self.address,) if isinstance(self.address, TcpAddress) else ()
        return (*first, *(each for each in self.listen if each not in first))

    @property
    def doors(self) -> tuple[TcpAddress, ...]:
        """Every TCP address where anything of the daemon's own listens, the REST API included."""
        others = (*self.rest, *self.metrics)
        return (*self.ports, *(each for each in others if isinstance(each, TcpAddress)))

    @property
    def tls_doors(self) -> tuple[TcpAddress, ...]:
        """Every address that takes a certificate."""
        previews = () if self.previews is None else (self.previews,)
        return tuple(each for each in (*self.doors, *previews) if each.tls)

    def settings(self) -> list[Setting]:
        """List every key with its value and source, in the order of the documentation."""
        return [
            Setting(
                key=key.name,
                value=key.kind.toml(getattr(self, key.field)),
                source=self.sources[key.name],
            )
            for key in KEYS
        ]


def load(argv: Sequence[str], environ: Mapping[str, str], *, root: bool | None = None) -> Config:
    """Read the configuration from flags, environment and file.

    :param root: Take root's defaults, or another user's; None: as the process is.
    :raise InvalidArgumentError: INVALID_CONFIG; the message names every wrong key with its value,
        source and what is allowed, one a line.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    return from_flags(vars(parser.parse_args(argv)), environ, root=root)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser ``--config`` and the flag of every key.

    Only flags that were given become attributes, so that the same flags may be added to a command
    and to its subcommands.
    """
    group = parser.add_argument_group("configuration (each also in the file and the environment)")
    group.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="TOML file to read [STRATABOX_CONFIG]",
    )
    for key in KEYS:
        group.add_argument(
            key.flag,
            metavar="VALUE",
            default=argparse.SUPPRESS,
            dest=key.field,
            help=f"{key.doc} [{key.variable}]".replace("%", "%%"),
        )


def from_flags(
    flags: Mapping[str, Any], environ: Mapping[str, str], *, root: bool | None = None
) -> Config:
    """Do as `load` does, for flags that `add_flags` has parsed (others are passed over)."""
    around = Surroundings(
        root=os.geteuid() == 0 if root is None else root,
        environ=environ,
        home=Path(environ.get("HOME") or Path.home()),
    )
    errors: list[str] = []
    path, rows = _read_file(flags, environ, around)
    errors += _unknown_keys(path, rows)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key in KEYS:
        raw, source = _choose(key, flags, environ, path, rows, around)
        try:
            values[key.field] = key.kind.parse(raw)
        except ValueError as error:
            errors.append(_explain(key, raw, source, str(error)))
            continue
        sources[key.name] = source
        if key.name == "state_dir":
            around = replace(
                around, state_dir=values[key.field], state_dir_was_set=source != DEFAULT
            )
    if errors:
        raise InvalidArgumentError("\n".join(errors), reason=REASON)
    return Config(**values, sources=sources)


def _read_file(
    flags: Mapping[str, Any], environ: Mapping[str, str], around: Surroundings
) -> tuple[Path, Mapping[str, object]]:
    """Read the TOML file. The default one may be absent, a named one must be there."""
    named = flags.get("config") or environ.get("STRATABOX_CONFIG")
    path = Path(named).absolute() if named else default_file(around)
    by = "--config" if flags.get("config") else "STRATABOX_CONFIG"
    try:
        return path, _flat(tomllib.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError) as error:
        if not named:
            return path, {}
        message = f"configuration file {path} (named by {by}) does not exist"
        raise InvalidArgumentError(message, reason=REASON) from error
    except OSError as error:
        message = f"configuration file {path} cannot be read: {error.strerror}"
        raise InvalidArgumentError(message, reason=REASON) from error
    except ValueError as error:  # TOML's own, or of text that is not UTF-8
        message = f"configuration file {path} is not TOML: {error}"
        raise InvalidArgumentError(message, reason=REASON) from error


def _flat(rows: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Rows of tables under their dotted names."""
    found: dict[str, object] = {}
    for name, value in rows.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _unknown_keys(path: Path, rows: Mapping[str, object]) -> list[str]:
    known = [key.name for key in KEYS]
    errors = []
    for name in rows:
        if name not in known:
            near = difflib.get_close_matches(name.replace("-", "_").lower(), known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            errors.append(f"unknown key {_shown(name)} in {path}{hint}")
    return errors


def _choose(
    key: Key,
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    path: Path,
    rows: Mapping[str, object],
    around: Surroundings,
) -> tuple[object, str]:
    """Find the source that counts for one key. An empty environment variable counts as unset."""
    if key.field in flags:
        return flags[key.field], f"flag {key.flag}"
    if environ.get(key.variable):
        return environ[key.variable], f"environment {key.variable}"
    if key.name in rows:
        return rows[key.name], f"file {path}"
    return key.default_for(around), DEFAULT


def _explain(key: Key, raw: object, source: str, detail: str) -> str:
    detail = f"{detail}; allowed: " if detail else "allowed: "
    return f"{key.name} = {_shown(raw)} ({source}): {detail}{key.kind.allowed}"


def _shown(raw: object) -> str:
    text = f'"{raw}"' if isinstance(raw, str) and raw.isprintable() else repr(raw)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidArgumentError(message, reason=REASON)
