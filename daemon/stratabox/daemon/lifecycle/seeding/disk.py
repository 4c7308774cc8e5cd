"""What is on a seed: a small ISO 9660 volume called "cidata", as cloud-init's NoCloud wants it.

```
meta-data       who the guest is: the sandbox's id, its host name, keys that may log in
user-data       the caller's own, untouched
vendor-data     ours: a boothook that brings the agent's set-up and what our images have
network-config  DHCP on its card, whatever address that has: copies get another one
```
Ours is no part of the user data, so that neither takes anything from the other: cloud-init would
replace the one's lists by the other's. A boothook runs before all modules, at each boot.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pycdlib

from stratabox.daemon.images import initramfs, overlay

LABEL = "cidata"
CARD = "enp0s4"
"""What systemd calls a guest's network card by its place on the bus."""
UNITS: tuple[str, ...] = ()
"""Of our Debian image: systemd's units that a cloud image's guest gets, too."""

_OURS = Path(__file__).parent / "guest"
_EMPTY = b"#cloud-config\n{}\n"


def seed(
    *,
    instance: str,
    hostname: str,
    user_data: bytes = b"",
    keys: Sequence[str] = (),
    offline: bool = False,
) -> bytes:
    """The whole volume.

    :param instance: cloud-init does once what is to be done once for each.
    :param offline: it boots without a network, and cloud-init is not to wait for one.
    :param user_data: as its user wrote it.
    :param keys: SSH keys of whom the image's user lets in, a line each.
    """
    meta = {"instance-id": instance, "local-hostname": hostname, "public-keys": list(keys)}
    if offline:
        # Then all but the modules of its last stages is done before the network is waited for.
        meta["dsmode"] = "local"
    card = {"match": {"name": "e*"}, "dhcp4": True, "optional": True}
    return _volume(
        {
            "meta-data": json.dumps(meta).encode(),
            "user-data": user_data or _EMPTY,
            "vendor-data": _boothook(),
            "network-config": json.dumps({"version": 2, "ethernets": {CARD: card}}).encode(),
        }
    )


def _boothook() -> bytes:
    files = base64.encodebytes(_files())
    head = f"sum={hashlib.sha256(files).hexdigest()}\nunits='{' '.join(UNITS)}'\n"
    script = (_OURS / "setup").read_bytes()
    return b"#cloud-boothook\n#!/bin/sh\n" + head.encode() + script + b"#FILES\n" + files


def _files() -> bytes:
    """Our files for a guest; the same bytes for the same files."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for tree in (initramfs.GUEST / "common", _OURS / "root"):
            for path in sorted(tree.rglob("*")):
                if path.is_file():
                    _add(archive, PurePosixPath(path.relative_to(tree)), path.read_bytes())
        for unit in UNITS:
            name = PurePosixPath("etc/systemd/system") / unit
            _add(archive, name, (initramfs.GUEST / "debian" / "root" / name).read_bytes())
    return gzip.compress(tar.getvalue(), mtime=0)


def _add(archive: tarfile.TarFile, name: PurePosixPath, content: bytes) -> None:
    entry = tarfile.TarInfo(str(name))
    entry.size = len(content)
    entry.mode = overlay.mode_of(content)
    archive.addfile(entry, io.BytesIO(content))


def _volume(files: dict[str, bytes]) -> bytes:
    volume = pycdlib.PyCdlib()
    # Joliet and Rock Ridge: names as they are, for whichever of them a guest's kernel has.
    volume.new(interchange_level=3, vol_ident=LABEL, joliet=3, rock_ridge="1.09")
    try:
        for number, (name, content) in enumerate(files.items()):
            volume.add_fp(
                io.BytesIO(content),
                len(content),
                f"/FILE{number}.;1",
                rr_name=name,
                joliet_path=f"/{name}",
            )
        made = io.BytesIO()
        volume.write_fp(made)
    finally:
        volume.close()
    return made.getvalue()
