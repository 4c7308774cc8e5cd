"""A small internet of network namespaces: a host that daemons run on, and a world behind it.

```
 host namespace                          world namespace
   lo   93.184.216.1   (public, its own)   lo  93.184.216.53  name server
   wan  192.168.77.1  ────────────────── lan  192.168.77.2   a neighbour
   default route ──────────────────────▶   lo  93.184.216.10  packages      93.184.216.66  elsewhere
                                            lo  10.66.0.1, 100.64.0.1, 172.16.5.5, 169.254.169.254
```

In both, one process (this file, run as a program) answers HTTP on ports 80 and 8080 of every
address and writes down each connection that it gets: so a test knows what was reached, whoever
says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES, ELSEWHERE, NAME_SERVER = "93.184.216.10", "93.184.216.66", "93.184.216.53"
NEIGHBOUR, HOST, HOST_PUBLIC = "192.168.77.2", "192.168.77.1", "93.184.216.1"
METADATA, PRIVATE = "169.254.169.254", ("10.66.0.1", "100.64.0.1", "172.16.5.5")
PORTS = (80, 8080)
ZONE = {
    "pkg.test": [PACKAGES],
    "files.pkg.test": [PACKAGES],
    "other.test": [ELSEWHERE],
    "rebind.pkg.test": [NEIGHBOUR, "127.0.0.1", METADATA, "10.0.2.2", HOST_PUBLIC, PACKAGES],
}
ALIASES = {"www.pkg.test": "pkg.test"}


@dataclass
class World:
    """Both namespaces, and what was reached in them."""

    name: str
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _read: dict[Path, int] = field(default_factory=dict)
    """Bytes of each log that were looked at."""

    @property
    def host(self) -> str:
        """The namespace that daemons run in."""
        return f"{self.name}h"

    @property
    def beyond(self) -> str:
        """The other one."""
        return f"{self.name}w"

    @property
    def inside(self) -> list[str]:
        """What makes a command run in the host namespace."""
        return ["ip", "netns", "exec", self.host]

    @property
    def files(self) -> Path:
        """What the world's servers serve."""
        return self.folder / "files"

    def reached(self) -> list[str]:
        """What connections there were since the last question, as "address:port"; and names."""
        found = []
        for log in sorted(self.folder.glob("*.log")):
            with log.open("rb") as file:
                file.seek(self._read.get(log, 0))
                new = file.read()
            self._read[log] = self._read.get(log, 0) + len(new)
            found += new.decode().split()
        return found


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """Make it; nothing of it is left afterwards. Takes root."""
    made = World(f"sbx{os.getpid()}", folder)
    made.files.mkdir(parents=True)
    resolv = Path("/etc/netns") / made.host / "resolv.conf"
    try:
        for name in (made.host, made.beyond):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip(
            "-n",
            made.host,
            "link",
            "add",
            "wan",
            "type",
            "veth",
            "peer",
            "name",
            "lan",
            "netns",
            made.beyond,
        )
        _ip("-n", made.host, "addr", "add", f"{HOST}/24", "dev", "wan")
        _ip("-n", made.host, "addr", "add", f"{HOST_PUBLIC}/32", "dev", "lo")
        _ip("-n", made.beyond, "addr", "add", f"{NEIGHBOUR}/24", "dev", "lan")
        for address in (PACKAGES, ELSEWHERE, NAME_SERVER, METADATA, *PRIVATE):
            _ip("-n", made.beyond, "addr", "add", f"{address}/32", "dev", "lo")
        _ip("-n", made.host, "link", "set", "wan", "up")
        _ip("-n", made.beyond, "link", "set", "lan", "up")
        _ip("-n", made.host, "route", "add", "default", "via", NEIGHBOUR)
        resolv.parent.mkdir(parents=True)
        resolv.write_text(f"nameserver {NAME_SERVER}\n")
        _serve(made, made.host, "127.0.0.1")
        _serve(made, made.beyond, NAME_SERVER)
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait()
        for name in (made.host, made.beyond):
            subprocess.run(["ip", "netns", "del", name], check=False)
        resolv.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            resolv.parent.rmdir()
            resolv.parent.parent.rmdir()


def _serve(made: World, name: str, names_at: str) -> None:
    log = made.folder / f"{name}.log"
    process = subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, __file__, log, made.files, names_at],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    made.processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def make_packages(files: Path) -> None:
    """A Debian repository at /apt, a Python index at /simple, and pip itself at /pip.zip."""
    apt = files / "apt"
    tree = files / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr/bin").mkdir(parents=True)
    apt.mkdir()
    control = (
        "Package: strata-demo\nVersion: 1\nArchitecture: all\nMaintainer: Tests <t@pkg.test>\n"
    )
    control += "Description: a demonstration\n"
    (tree / "DEBIAN/control").write_text(control)
    program = tree / "usr/bin/strata-demo"
    program.write_text("#!/bin/sh\necho installed by apt\n")
    program.chmod(0o755)
    deb = apt / "strata-demo_1_all.deb"
    command = ["dpkg-deb", "--build", "--root-owner-group", str(tree), str(deb)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    entry = f"{control}Filename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {digest}\n"
    (apt / "Packages").write_text(entry)
    listed = f"{hashlib.sha256(entry.encode()).hexdigest()} {len(entry)} Packages"
    (apt / "Release").write_text(f"Date: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {listed}\n")

    index = files / "simple" / "strata-demo"
    index.mkdir(parents=True)
    wheel = "strata_demo-1-py3-none-any.whl"
    info = "strata_demo-1.dist-info"
    with zipfile.ZipFile(index / wheel, "w") as archive:
        archive.writestr("strata_demo.py", "WORDS = 'installed by pip'\n")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: strata_demo\nVersion: 1\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    (index / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
    spec = importlib.util.find_spec("pip")
    assert spec is not None
    assert spec.origin is not None
    pip = Path(spec.origin).parent
    with zipfile.ZipFile(files / "pip.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(pip.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path, f"pip/{path.relative_to(pip)}")


# The program


class _Handler(http.server.SimpleHTTPRequestHandler):
    def setup(self) -> None:
        super().setup()
        address, port = self.connection.getsockname()[:2]
        note(f"{address}:{port}")

    def do_GET(self) -> None:
        if self.path == "/whoami":
            self._send(self.connection.getsockname()[0].encode() + b"\n")
        elif self.path.startswith("/zeros/"):
            count = int(self.path.removeprefix("/zeros/"))
            self._head(count)
            for _ in range(count >> 16):
                self.wfile.write(bytes(1 << 16))
        elif self.path == "/drip":
            self._head(1 << 30)
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b".\n")
                    time.sleep(0.05)
            note("drip-ended")
        else:
            super().do_GET()

    def _head(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, body: bytes) -> None:
        self._head(len(body))
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


_lock = threading.Lock()


def note(what: str) -> None:
    """Write down one thing that was reached."""
    with _lock, Path(sys.argv[1]).open("a") as log:
        log.write(f"{what}\n")


def _answer_names(names: socket.socket) -> None:
    import dns.flags
    import dns.message
    import dns.rcode
    import dns.rdatatype
    import dns.rrset

    with names:
        while True:
            wire, sender = names.recvfrom(4096)
            query = dns.message.from_wire(wire)
            name = query.question[0].name.to_text(omit_final_dot=True).lower()
            note(name)
            reply = dns.message.make_response(query, recursion_available=True)
            target = ALIASES.get(name, name)
            if target != name:
                reply.answer.append(dns.rrset.from_text(f"{name}.", 5, "IN", "CNAME", f"{target}."))
            if target not in ZONE:
                reply.set_rcode(dns.rcode.NXDOMAIN)
            elif query.question[0].rdtype == dns.rdatatype.A:
                reply.answer.append(dns.rrset.from_text(f"{target}.", 5, "IN", "A", *ZONE[target]))
            names.sendto(reply.to_wire(), sender)


def main() -> None:
    """Serve, in whichever namespace this is."""
    os.chdir(sys.argv[2])
    for port in PORTS:
        server = http.server.ThreadingHTTPServer(("0.0.0.0", port), _Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind((sys.argv[3], 53))  # now: what is asked before the thread has begun waits there
    threading.Thread(target=_answer_names, args=(names,), daemon=True).start()
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
