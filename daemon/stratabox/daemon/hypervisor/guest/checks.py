"""Is something in the guest up? Asked through its agent, by what any guest has.

For guests without sshd; where there is one, a connection of the channel is quicker and truer.
"""

from __future__ import annotations

from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.guest.exec import execute

# TCP sockets that listen, by the kernel's own list: any address will do.
_LISTENS = """\
port=$(printf ':%04X' "$1")
while read -r _ local _ state _; do
  case $local in *"$port") [ "$state" = 0A ] && exit 0 ;; esac
done <<END
$(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null)
END
exit 1
"""

# Prints the status line. Whichever of the usual tools is there; 125: none of them.
_ASK = """\
if command -v curl >/dev/null; then
  exec curl -sS -o /dev/null -m "$3" -w 'HTTP/1.1 %{http_code}\\n' "http://127.0.0.1:$1$2"
elif command -v nc >/dev/null; then
  { printf 'GET %s HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n' "$2"; sleep "$3"; } |
    nc 127.0.0.1 "$1" | head -n 1
elif command -v wget >/dev/null; then
  wget -q -S -O /dev/null --max-redirect=0 -T "$3" "http://127.0.0.1:$1$2" 2>&1 |
    sed -n 's/^ *HTTP/HTTP/p' | head -n 1
elif command -v bash >/dev/null; then
  exec bash -c 'exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
    printf "GET %s HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n" "$2" >&3
    head -n 1 <&3' ask "$1" "$2"
else
  exit 125
fi
"""
_NO_TOOL = 125


async def port_listens(agent: GuestAgent, port: int, seconds: float) -> bool:
    """Whether something listens on a TCP port. :raise UnavailableError: AGENT_UNAVAILABLE."""
    words = ["/bin/sh", "-c", _LISTENS, "listens", str(port)]
    result = await execute(agent, words, timeout=seconds)
    return result.exit_code == 0


async def http_status_line(agent: GuestAgent, port: int, path: str, seconds: float) -> str:
    """First line of what a server on that port answers to GET; "" when it does not.

    :raise UnavailableError: AGENT_UNAVAILABLE.
    :raise LookupError: when the guest has none of the programs that can ask.
    """
    limit = str(max(1, round(seconds)))
    words = ["/bin/sh", "-c", _ASK, "ask", str(port), path, limit]
    result = await execute(agent, words, timeout=seconds)
    if result.exit_code == _NO_TOOL:
        raise LookupError("the guest has neither sshd nor curl, nc, wget or bash")
    return result.stdout[:200].decode(errors="replace").splitlines()[0] if result.stdout else ""
