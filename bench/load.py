"""A guest that writes: known amounts of memory, each time with other contents."""

from __future__ import annotations

from bench.product import Product
from stratabox.client import Sandbox

WRITTEN = 32 << 20
_SEED = WRITTEN // 4
# Two seeds of random bytes are made once (emulated, that takes a second); each write is of the
# other one, four times over, in place: so 32 MB change, and nothing else to speak of.
_PREPARE = (
    "mkdir -p /m && mount -t tmpfs -o size=95% none /m"
    f" && head -c {_SEED} /dev/urandom >/m/0 && head -c {_SEED} /dev/urandom >/m/1"
)


class Writer:
    """The load in one guest."""

    def __init__(self, made: Product, sandbox: Sandbox) -> None:
        self._made, self._sandbox, self._count = made, sandbox, 0
        made.run(sandbox, _PREPARE)
        self.write()

    def write(self) -> None:
        """Change `WRITTEN` bytes of memory."""
        seed = f"/m/{self._count % 2}"
        self._made.run(self._sandbox, f"cat {seed} {seed} {seed} {seed} 1<>/m/x")
        self._count += 1

    def touch(self, size: int) -> None:
        """Use `size` bytes of memory that were not used before."""
        self._made.run(self._sandbox, _touch(size))


def using(size: int) -> str:
    """A line for a fresh guest's shell that uses `size` bytes of its memory."""
    return f"{_PREPARE} && cat /m/0 /m/1 /m/0 /m/1 >/m/x && {_touch(size)}"


def _touch(size: int) -> str:
    return f"for n in $(seq {size // WRITTEN}); do cat /m/x >/m/touched-$n || exit 1; done"
