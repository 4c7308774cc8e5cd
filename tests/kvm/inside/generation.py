"""The generation id on KVM: the kernel of a guest that was copied hears of it, and reseeds."""

from __future__ import annotations

from pathlib import Path

from stratabox.daemon.hypervisor.memory.save import Base
from support.bench import make_bench, running
from support.memory import Memories

_RESEEDS = "dmesg | grep -c 'crng reseeded due to virtual machine fork' || true"


async def test_the_kernel_of_a_restored_guest_reseeds(tmp_path: Path) -> None:
    bench = await make_bench(tmp_path)
    (tmp_path / "ram").mkdir()
    memories = Memories(bench, tmp_path / "ram")
    async with running(bench.launcher, await bench.spec()) as guest:
        assert guest.spec.machine.accelerator == "kvm"
        assert await guest.sh(_RESEEDS) == "0"
        kept = await memories.take(guest, Base(origin=None))
        async with memories.restored(guest, kept) as restored:
            assert await restored.sh(_RESEEDS) == "1"
        assert await guest.sh(_RESEEDS) == "0"
