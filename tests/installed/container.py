"""Hosts whose systemd is real and whose kernel is this one's: systemd-nspawn(1).

Guests run in them as quickly as they do here, so what needs guests is checked in them. They have
no controllers where this host's are in hierarchies of version 1: what limits do is seen in `outer`
hosts. Each boot has a tmpfs at /run.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from installed.host import LINE_SECONDS, PACKAGES, SYSTEM_API, CommandError, Host
from stratabox.daemon.hypervisor import cgroup
from support.rig import eventually

_INIT = ("dbus", "procps", "python3", "systemd", "systemd-sysv")
_BUILDING = ("debian-archive-keyring", "mmdebstrap")
_BOOT_SECONDS = 120
_END_SECONDS = 120
_numbers = itertools.count()


def build_root(target: Path) -> None:
    """Make the root folder of a host without the package; takes a minute.

    :raise CalledProcessError: when mmdebstrap failed, which has said why.
    """
    include = f"--include={','.join(sorted({*PACKAGES, *_INIT, *_BUILDING}))}"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", include, "bookworm", str(target)],
        stdin=subprocess.DEVNULL,
        check=True,
    )


class Container(Host):
    """A host, whose disk outlives its boots.

    :param layers: what its root folder consists of, the uppermost first, the last one as
        `build_root` made it. None of them is written.
    :param folder: an empty one, for what it writes, as another such layer, and its console.
    :param network: it has this host's.
    """

    def __init__(self, layers: Sequence[Path], folder: Path, *, network: bool = False) -> None:
        self._network = network
        self.written = folder / "written"
        self._layers = layers
        self._folder = folder
        self._console = folder / "console"
        for each in ("written", "work", "root"):
            (folder / each).mkdir(exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: Path | None = None

    @property
    def leader(self) -> int:
        """Its first process, as this host numbers it; 0: it does not run."""
        if self._process is None:
            return 0
        for supervisor in _children(self._process.pid):
            for child in _children(supervisor):
                if _pids(child)[-1:] == [1]:
                    return child
        return 0

    def boot(self) -> None:
        """Boot it, and wait until its boot is over."""
        assert self._process is None
        self._groups = _group_of_its_own()
        root, work = self._folder / "root", self._folder / "work"
        layers = f"lowerdir={':'.join(map(str, self._layers))},upperdir={self.written}"
        script = [
            *([f"echo 0 >{self._groups}/cgroup.procs"] if self._groups is not None else []),
            # In a mount namespace that goes with it.
            f"mount -t overlay sbx -o {layers},workdir={work} {root}",
            'exec "$@"',
        ]
        command = [
            # Whatever ends us ends nspawn, and with that, the first of its pid namespace, the rest.
            *("setpriv", "--pdeathsig", "KILL"),
            *("unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"),
            *("sh", "-c", " && ".join(script), "sh"),
            *("systemd-nspawn", "--quiet", "--settings=no", "--boot", "--console=pipe"),
            *("--register=no", "--keep-unit"),
            *(() if self._network else ("--private-network",)),
            *(f"--directory={root}", f"--machine=sbx-{os.getpid()}-{next(_numbers)}"),
            # Refused by default, and to be had on a host.
            "--system-call-filter=userfaultfd",
        ]
        with self._console.open("ab") as console:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )
        eventually(self._is_up, _BOOT_SECONDS, what="its boot does not end")

    def reboot(self) -> None:
        """Reboot it as an administrator does."""
        self.run("systemctl reboot")
        self._ended()
        self.boot()

    def power_off(self) -> None:
        """End it as an administrator does."""
        self.run("systemctl poweroff")
        self._ended()

    def cut_power(self) -> None:
        """End all of its processes at once. What they have written is in the host's page cache."""
        if self._process is not None:
            self._process.kill()
            self._ended()

    def run(self, line: str, *, seconds: float = LINE_SECONDS) -> tuple[int, str]:
        entered = ["nsenter", f"--target={self.leader}", "--wdns=/"]
        entered += ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        clean = ["env", "-i", f"PATH={path}", "HOME=/root", "LC_ALL=C.UTF-8"]
        try:
            done = subprocess.run(
                [*entered, *clean, "sh", "-c", f"{{ {line}\n}} 2>&1"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            said = (late.output or b"").decode(errors="replace")
            raise CommandError(f"{line}: {seconds:.0f} s were not enough:\n{said}") from None
        return done.returncode, done.stdout.decode(errors="replace").rstrip("\n")

    def put(self, source: Path) -> str:
        shutil.copy(source, f"/proc/{self.leader}/root/root")
        return f"/root/{source.name}"

    @contextlib.contextmanager
    def api(self, socket: str = SYSTEM_API) -> Iterator[str]:
        yield f"unix:///proc/{self.leader}/root{socket}"

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._console.read_text()
        state = "systemctl is-system-running"
        return self.leader != 0 and self.run(state)[1] in ("running", "degraded")

    def _ended(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(_END_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._groups is not None:
            _remove(self._groups)


def _children(process: int) -> list[int]:
    try:
        said = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(each) for each in said.split()]


def _pids(process: int) -> list[int]:
    """Its numbers in its pid namespaces, this one's first."""
    try:
        said = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return []
    line = next(each for each in said.splitlines() if each.startswith("NSpid:"))
    return [int(each) for each in line.split()[1:]]


def _group_of_its_own() -> Path | None:
    """A control group in which nspawn makes its own; None on a host without version 2."""
    points = cgroup.hierarchies()
    if not points:
        return None
    made = points[0] / f"stratabox-installed-{os.getpid()}-{next(_numbers)}"
    made.mkdir()
    return made


def _remove(group: Path) -> None:
    """Remove a control group and those in it, once the last killed process has gone."""
    events = group / "cgroup.events"
    eventually(lambda: "populated 0" in events.read_text(encoding="ascii"), what=f"{group} lives")
    for folder in sorted(group.rglob("*/"), key=lambda path: -len(path.parts)):
        folder.rmdir()
    group.rmdir()
