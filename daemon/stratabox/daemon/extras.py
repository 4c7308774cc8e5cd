"""Which optional parts of the distribution are installed. Imports nothing to find out."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

DAEMON = ("qemu.qmp", "grpc_health", "grpc_reflection", "fastapi", "uvicorn")
"""Modules that the [daemon] extra brings."""
LIBVIRT = ("libvirt",)
"""Modules that the [libvirt] extra adds."""
INSTALL_DAEMON = "pip install 'stratabox[daemon]'"
INSTALL_LIBVIRT = (
    "apt install python3-libvirt for the Debian package, else pip install 'stratabox[libvirt]',"
    " which builds against libvirt-dev"
)


def missing_modules(names: Sequence[str]) -> list[str]:
    """List those of these modules that are not installed."""
    return [name for name in names if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package above it
        return False
