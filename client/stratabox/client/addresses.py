"""Where the daemon is: reads the environment and the configuration file, opens nothing else.

The first of these that says something:

1. the address given by the caller;
2. `STRATABOX_ADDRESS`: `unix:///path`, `https://host:port`, or `http://host:port`;
3. `address` in the configuration file (`STRATABOX_CONFIG`, else /etc/stratabox/config.toml for
   root, $XDG_CONFIG_HOME/stratabox/config.toml for others);
4. `STRATABOX_STATE_DIR`, else `state_dir` in that file: its api.sock;
5. /run/stratabox/api.sock for root; for others $XDG_RUNTIME_DIR/stratabox/api.sock, or
   $XDG_DATA_HOME/stratabox/api.sock where there is no runtime folder.

The daemon has the same rule in its own configuration module.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from stratabox.client.errors import InvalidAddressError

_SOCKET = "api.sock"
_SOCKET_PATH_LIMIT = 107  # bytes; sockaddr_un less its final NUL


def default_address(environ: Mapping[str, str] | None = None, *, uid: int | None = None) -> str:
    """Find the daemon's address when the caller gives none.

    :param environ: In place of the process's environment.
    :param uid: In place of the process's effective user id.
    :raise InvalidAddressError: when the configuration file is named and cannot be read, or is no
        TOML, or holds something else than text under `address` or `state_dir`.
    """
    env = os.environ if environ is None else environ
    root = (os.geteuid() if uid is None else uid) == 0
    if address := env.get("STRATABOX_ADDRESS"):
        return address
    settings = _configuration(env, root=root)
    if address := _text(settings, "address"):
        return address
    if state_dir := env.get("STRATABOX_STATE_DIR") or _text(settings, "state_dir"):
        return f"unix://{Path(state_dir).absolute() / _SOCKET}"
    if root:
        folder = Path("/run")
    else:
        folder = (
            _xdg(env, "XDG_RUNTIME_DIR")
            or _xdg(env, "XDG_DATA_HOME")
            or _home(env) / ".local" / "share"
        )
    return f"unix://{folder / 'stratabox' / _SOCKET}"


def grpc_target(address: str) -> str:
    """Turn an address into what gRPC connects to.

    :raise InvalidAddressError: when it is neither `unix:///path` nor `http[s]://host:port`.
    """
    if address.startswith("unix:///"):
        path = address.removeprefix("unix://")
        if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
            raise InvalidAddressError(
                f"the socket's path {path!r} is longer than {_SOCKET_PATH_LIMIT} bytes"
            )
        return f"unix://{quote(path)}"
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port
        good = good and parts.path in ("", "/") and not parts.query and not parts.username
    except ValueError:
        good = False
    if not good:
        raise InvalidAddressError(
            f"the address {address!r} is neither unix:///path nor http[s]://host:port"
        )
    return parts.netloc


def is_loopback(address: str) -> bool:
    """Tell whether what is sent to a TCP address stays on this host."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _configuration(env: Mapping[str, str], *, root: bool) -> dict[str, Any]:
    named = env.get("STRATABOX_CONFIG")
    if named:
        path = Path(named)
    elif root:
        path = Path("/etc/stratabox/config.toml")
    else:
        folder = _xdg(env, "XDG_CONFIG_HOME") or _home(env) / ".config"
        path = folder / "stratabox" / "config.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if named:
            raise InvalidAddressError(
                f"STRATABOX_CONFIG names {path}, which is not there"
            ) from None
        return {}
    except (OSError, ValueError) as error:
        raise InvalidAddressError(f"cannot read the configuration file {path}: {error}") from error
    import tomllib  # here, for the quick start of the CLI where there is no such file

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidAddressError(f"{path} is no TOML: {error}") from error


def _text(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key, "")
    if not isinstance(value, str):
        raise InvalidAddressError(f"{key} in the configuration file is not text: {value!r}")
    return value


def _xdg(env: Mapping[str, str], name: str) -> Path | None:
    """Read one of the XDG folders; a relative one is ignored, as the specification says."""
    value = env.get(name, "")
    return Path(value) if value.startswith("/") else None


def _home(env: Mapping[str, str]) -> Path:
    return Path(env.get("HOME") or Path.home())
