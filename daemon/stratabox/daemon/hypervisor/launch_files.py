"""Opens what a domain is started with, and names it to QEMU by descriptor.

QEMU runs as a user that may not enter the state folder, so nothing is handed over by its path:

- disks and the BIOS through ``-add-fd`` and ``/dev/fdset/N``. QEMU duplicates such a descriptor and
  never opens the file, so the file's mode does not matter. The active overlay gives two, one to
  write and one to read: when a newer overlay goes on top QEMU reopens it read-only, and picks the
  one that fits;
- saved memory through ``/proc/self/fd/N`` too: memfds that are sealed, so that QEMU may open them
  as it likes (before 8.2 it opens RAM for writing, although it only maps it privately);
- kernel, initrd and the firmware folder through ``/proc/self/fd/N``, because QEMU takes them with
  plain fopen. The kernel then checks the modes of *these* inodes (not of the folders above), so
  the files must be 0444 and the folder 0555 or more.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from stratabox.daemon.hypervisor import sockets
from stratabox.daemon.hypervisor.confinement import Reopened
from stratabox.daemon.hypervisor.machine import ChainLayer, DomainSpec
from stratabox.daemon.hypervisor.memory import tracking
from stratabox.daemon.hypervisor.qemu_host import BIOS
from stratabox.storage.files.memory.sealed import is_sealed
from stratabox.storage.model.errors import CorruptError, FailedError, InternalError

WRITE = "rw"
READ = "ro"


def opaque(mode: str, layer: ChainLayer) -> str:
    """How a descriptor of a layer is labelled in QEMU's sets, so that it is found again."""
    return f"{mode}:{layer.node}"


class InheritedFiles:
    """Descriptors for one start; a context manager that closes them when QEMU has its own.

    Implements `command_line.Files`.

    :param first: QEMU has them under numbers from there on, in the order of `descriptors`; None:
        under the numbers that they have here.
    :raise CorruptError: LAYER_MISSING, on a file that is not there.
    :raise FailedError: QEMU_FAILED, on one that cannot be opened.
    """

    def __init__(self, spec: DomainSpec, first: int | None = None) -> None:
        self._spec = spec
        self._first = first
        self._stack = ExitStack()
        self._sets: list[str] = []
        self._next_set = 0
        self.descriptors: list[int] = []
        """To be given to QEMU."""
        self._files: list[int] = []
        self._folders: dict[int, Path | None] = {}
        self._devices: list[int] = []

    def __enter__(self) -> InheritedFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def firmware_dir(self) -> str:
        """-L: a folder by its descriptor."""
        folder = self._spec.firmware_dir
        return self._by_proc(folder, os.O_RDONLY | os.O_DIRECTORY, needed=0o005)

    def ram(self) -> str:
        """The sealed memfd that holds the saved RAM, or the kernel's zeros."""
        saved = self._spec.saved
        if saved is None:
            if self._first is None:
                return tracking.FRESH
            # Whoever starts QEMU may show it another /dev, and RAM is found by this one's inode.
            return self._by_proc(Path(tracking.FRESH), os.O_RDWR, needed=0o006)
        if not is_sealed(saved.ram, self._spec.memory << 20):
            raise InternalError("saved RAM is not sealed, or not of the guest's size")
        return self._again(saved.ram, os.O_RDONLY)

    def state(self) -> str | None:
        """What QEMU is to load, as for migrate-incoming: an own open file of the saved state, since
        many start from it, each at its beginning. None: nothing."""
        if self._spec.saved is None:
            return None
        return f"fd:{self._again(self._spec.saved.state, os.O_RDONLY).rpartition('/')[2]}"

    def environment(self) -> dict[str, str]:
        """Variables that have QEMU note which pages its guest writes, where that can be, and let
        this user's next daemon read them."""
        own_user = self._spec.uid is None and os.geteuid() != 0
        if not (tracking.LIBRARY.exists() and (own_user or tracking.has_write_tracking())):
            return {}
        library = self._by_proc(tracking.LIBRARY, os.O_RDONLY, needed=0o004)
        saved = self._spec.saved
        ram = tracking.FRESH if saved is None else f"/proc/self/fd/{saved.ram}"
        return tracking.environment(library, ram, own_user=own_user)

    def bios(self) -> str:
        """The flash's file."""
        number = self._new_set()
        self._add(number, self._open(self._spec.firmware_dir / BIOS, os.O_RDONLY), "bios")
        return f"/dev/fdset/{number}"

    def kernel(self) -> str:
        """-kernel."""
        return self._by_proc(_needed(self._spec.kernel), os.O_RDONLY, needed=0o004)

    def initrd(self) -> str:
        """-initrd."""
        return self._by_proc(_needed(self._spec.initrd), os.O_RDONLY, needed=0o004)

    def seed(self) -> str:
        """The seed's file, for reading."""
        number = self._new_set()
        self._add(number, self._open(_needed(self._spec.seed), os.O_RDONLY), "seed")
        return f"/dev/fdset/{number}"

    def layer(self, layer: ChainLayer, *, active: bool) -> str:
        """A set with a reading descriptor, and a writing one too for the active layer."""
        number = self._new_set()
        if active:
            self._add(number, self._open(layer.path, os.O_RDWR), opaque(WRITE, layer))
        self._add(number, self._open(layer.path, os.O_RDONLY), opaque(READ, layer))
        return f"/dev/fdset/{number}"

    def listener(self, name: str) -> str:
        """A socket that listens already."""
        return f"fd={self._listening(name)}"

    def network(self, name: str) -> Mapping[str, str]:
        """The same, as JSON has it."""
        return {"type": "fd", "str": str(self._listening(name))}

    def _listening(self, name: str) -> int:
        try:
            listening = sockets.listen(self._spec.folder, name)
        except OSError as error:
            raise FailedError(
                f"{self._spec.folder / name} cannot be made: {error.strerror}.",
                reason="QEMU_FAILED",
            ) from error
        self._stack.enter_context(listening)
        return self._given(listening.fileno())

    def extra(self) -> Sequence[str]:
        """The -add-fd arguments."""
        return self._sets

    def _new_set(self) -> int:
        self._next_set += 1
        return self._next_set

    def _given(self, descriptor: int) -> int:
        """Have it given to QEMU; returns its number there."""
        self.descriptors.append(descriptor)
        return descriptor if self._first is None else self._first + len(self.descriptors) - 1

    def _add(self, number: int, descriptor: int, label: str) -> None:
        # Labels are made of our own ids: letters, digits and one colon.
        self._sets += ["-add-fd", f"fd={self._given(descriptor)},set={number},opaque={label}"]

    def _by_proc(self, path: Path, flags: int, *, needed: int) -> str:
        descriptor = self._open(path, flags)
        mode = os.fstat(descriptor).st_mode
        if self._spec.uid is not None and mode & needed != needed:
            raise InternalError(f"{path} is not readable by QEMU's user: its mode is too narrow")
        number = self._given(descriptor)
        if flags & os.O_DIRECTORY:
            self._folders[number] = path
        elif stat.S_ISCHR(mode):
            self._devices.append(number)
        else:
            self._files.append(number)
        return f"/proc/self/fd/{number}"

    def reopened(self) -> Reopened:
        """What QEMU will open once more by its descriptor. Asked after everything else."""
        return Reopened(folders=self._folders, files=self._files, devices=self._devices)

    def _again(self, descriptor: int, flags: int) -> str:
        """Open a file in memory once more."""
        again = os.open(f"/proc/self/fd/{descriptor}", flags | os.O_CLOEXEC)
        self._stack.callback(os.close, again)
        return f"/proc/self/fd/{self._given(again)}"

    def _open(self, path: Path, flags: int) -> int:
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise CorruptError(
                f"{path} is missing from the store.", reason="LAYER_MISSING", path=path
            ) from error
        except OSError as error:
            raise FailedError(
                f"{path} cannot be opened: {error.strerror}.", reason="QEMU_FAILED"
            ) from error
        self._stack.callback(os.close, descriptor)
        return descriptor


def _needed(path: Path | None) -> Path:
    if path is None:
        raise InternalError("a guest was specified without a file that its machine names")
    return path
