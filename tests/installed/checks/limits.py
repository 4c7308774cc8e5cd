"""What systemd lets a guest of an installed daemon take; on a whole machine, with controllers."""

from __future__ import annotations

from pathlib import Path

from installed.guests import qemu, scopes
from installed.host import DAEMON
from installed.outer import Outer
from support.rig import eventually

_MIB = 1 << 20
_SETTINGS = '[cgroups]\\nio_weight = 50\\nio_write_bandwidth = "7MiB"\\n'
"""Of the disk traffic nothing is bounded unless somebody says so."""


def test_a_guests_scope_has_limits(fresh: Outer, seed: Path) -> None:
    """The guest is not waited for: an emulated machine within an emulated one takes minutes."""
    fresh.sh(f"printf '{_SETTINGS}' >>/etc/stratabox/config.toml && systemctl restart {DAEMON}")
    with fresh.client() as client:
        client.snapshots.import_file(seed)
        box = client.snapshots.restore("seed", name="one", wait_for_ready=False)
        pid = qemu(fresh, box.id)
        (scope,) = scopes(fresh)
        group = "/sys/fs/cgroup" + fresh.show(scope, "ControlGroup")
        assert fresh.sh(f"cat {group}/cgroup.procs") == str(pid)
        files = "memory.max cpu.max pids.max io.max io.weight"
        said = fresh.sh(f"cd {group} && grep -H . {files}")
        limits = dict(line.split(":", 1) for line in said.splitlines())
        # 128 MiB of RAM, and what is counted for QEMU and its translated code.
        assert 256 * _MIB < int(limits["memory.max"]) < 2048 * _MIB
        # One CPU of its own, and one for QEMU.
        assert limits["cpu.max"] == "200000 100000"
        assert 8 < int(limits["pids.max"]) < 1024
        assert f" wbps={7 * _MIB} " in limits["io.max"]
        assert limits["io.weight"] == "default 50"
        assert fresh.show(scope, "MemoryMax") == limits["memory.max"]
        told = fresh.sh("stratabox --address unix:///run/stratabox/api.sock host")
        print(told)
        assert int(fresh.sh(f"cat {group}/memory.current")) < int(limits["memory.max"])
        box.delete()
        eventually(lambda: scopes(fresh) == [], 60, what="the scope outlives its guest")
        eventually(lambda: fresh.run(f"test -e {group}")[0] != 0, 60)
        assert client.sandboxes.list() == []
