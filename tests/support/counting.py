"""A process in a guest that counts, and a nonce that only its memory holds."""

from __future__ import annotations

from stratabox.client import Sandbox

_COUNTER = """
mount -t tmpfs none /mnt
mkdir /mnt/test
cat > /mnt/test/counter <<'END'
nonce=$(head -c 16 /dev/urandom | sha256sum | cut -c 1-32)
n=0
while :; do
    n=$((n + 1))
    echo "$$ $nonce $n" > /mnt/test/now.new
    mv /mnt/test/now.new /mnt/test/now
    sleep 0.1
done
END
setsid sh /mnt/test/counter > /dev/null 2>&1 < /dev/null &
until [ -s /mnt/test/now ]; do sleep 0.1; done
"""


def start(sandbox: Sandbox) -> None:
    """Start it, and wait until it counts."""
    result = sandbox.execute(_COUNTER, timeout=300)
    assert result.exit_code == 0, result


def now(sandbox: Sandbox) -> tuple[str, str, int]:
    """(pid, nonce, count) of the process."""
    result = sandbox.execute("cat /mnt/test/now", timeout=300)
    assert result.exit_code == 0, result
    pid, nonce, count = result.stdout.decode().split()
    return pid, nonce, int(count)


def wait_on(sandbox: Sandbox) -> tuple[str, str, int]:
    """Wait until it has counted on; (pid, nonce, count) then."""
    before = now(sandbox)[2]
    line = f"while read -r pid nonce n < /mnt/test/now && [ $n -le {before} ]; do :; done"
    assert sandbox.execute(line, timeout=300).exit_code == 0
    return now(sandbox)


def is_gone(sandbox: Sandbox) -> bool:
    """Its guest has booted since."""
    return sandbox.execute("test -e /mnt/test/now", timeout=300).exit_code != 0
