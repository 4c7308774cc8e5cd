"""What a guest is given for its channel, through its agent, once for each boot.

```
/run/stratabox/authorized_keys   the daemon's key
               host_key          what the channel's sshd proves itself by
               sshd_config       its configuration; the system's own is not touched
               keeper-DIGEST     keeper.c, or a link to it where programs may not be run in /run
               keeper            the same
               onepoll           onepoll.c, which its sshd is started with; or a link to it
               pid               of the keeper that serves the ports
```

The keeper then serves each port with one ``sshd -i`` after the other, and where the machine has it
the one that commands go by without (`exec_port`). Under systemd it has a unit
of its own, so that neither the agent's end nor a command that takes all memory ends the others.

It needs a POSIX shell, an sshd, and `mkdir`, `chmod`, `ln`, `rm`, `kill`; nothing is kept on disk.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from stratabox.daemon.hypervisor.command_line import CHANNEL_NAMES, EXEC_NAME
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.guest.channel_keys import ChannelKeys, public_line
from stratabox.daemon.hypervisor.guest.exec import Errand, run_errand
from stratabox.storage.model.errors import DeniedError, FailedError

FOLDER = "/run/stratabox"
KEEPER = Path(__file__).with_name("keeper.1")
ONEPOLL = KEEPER.with_name("onepoll.1")
CIPHER = "aes128-ctr"
MAC = "hmac-md5-etm@openssh.com"
"""Nobody is on the wire, so these two are the fastest ones without hardware for them."""
_SETUP_SECONDS = 60.0
_NO_SSHD = "no sshd"

_CONFIG = f"""\
HostKey {FOLDER}/host_key
AuthorizedKeysFile {FOLDER}/authorized_keys
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
UseDNS no
PidFile none
PrintMotd no
PrintLastLog no
X11Forwarding no
AllowTcpForwarding yes
AllowStreamLocalForwarding yes
StreamLocalBindUnlink yes
PermitListen any
AcceptEnv *
MaxSessions 4096
LoginGraceTime 0
TCPKeepAlive no
ClientAliveInterval 0
Compression no
LogLevel QUIET
HostKeyAlgorithms ssh-ed25519
KexAlgorithms curve25519-sha256
Ciphers {CIPHER}
MACs {MAC}
Subsystem sftp internal-sftp
VersionAddendum """

_SCRIPT = """\
report() { printf '%s %s\\n' "$STRATABOX_EXEC" "$1" >&2; exit; }
umask 022
at=/run/stratabox
mkdir -p $at /run/sshd || report "there is no $at"
chmod 755 $at /run/sshd
serving() { read -r pid <$at/pid && read -r name <"/proc/$pid/comm" && [ "${name%%-*}" = keeper ]; }
if [ -z "$anew" ] && [ -x "$at/keeper-$digest" ] && serving 2>/dev/null; then report ''; fi
sshd= served=
for each in /usr/sbin/sshd /usr/local/sbin/sshd /usr/bin/sshd; do
    if [ -x $each ]; then sshd=$each; break; fi
done
[ -n "$sshd" ] || report 'no sshd'
last=
if serving 2>/dev/null; then last=$pid; fi
if [ -d /run/systemd/system ]; then
    systemctl stop 'stratabox-channel*.service' # it would begin again
fi >/dev/null 2>&1
# A unit's end is that of its first process alone, so that commands live on.
if [ -n "$last" ]; then kill -9 "-$last" || kill -9 "$last"; fi 2>/dev/null
put() { rm -f "$1.new" && printf '%s' "$2" >"$1.new" && mv -f "$1.new" "$1"; }
# Where root has a locked password, only PAM lets a key in.
pam=no
while IFS=: read -r user password rest; do
    case $user:$password in root:!*) pam=yes ;; esac
done 2>/dev/null </etc/shadow
put $at/authorized_keys "$authorized
" && put $at/sshd_config "${config}UsePAM $pam
" && (umask 077 && put $at/host_key "$host_key
") || report "$at cannot be written"
ready=
for place in $at /dev/shm /var/lib /root /tmp; do
    file=$place/.keeper-$digest
    rm -f "$file"
    (set -C && printf "$program" >"$file" && chmod 755 "$file" && "$file" try) 2>/dev/null
    if [ $? = 0 ]; then ready=$file; break; fi
    rm -f "$file"
done
[ -n "$ready" ] || report 'nowhere may programs be put and run'
# Without this one an sshd can oversleep, no more.
loaded=${ready%/*}/.onepoll-$digest
rm -f "$loaded" $at/onepoll
(set -C && printf "$library" >"$loaded" && chmod 755 "$loaded") 2>/dev/null &&
    ln -sfn "$loaded" $at/onepoll
ln -sfn "$ready" $at/keeper-$digest && ln -sfn "$ready" $at/keeper || report 'no link can be made'
set -- $at/keeper-$digest channel $at/pid $ports $sshd $at/sshd_config $exec_port
if [ -d /run/systemd/system ] && command -v systemd-run >/dev/null; then
    # Not after all of the boot: a guest's names can be half a minute late.
    systemd-run --collect --unit="stratabox-channel-$$" --description='Stratabox channel' \\
        -p DefaultDependencies=no -p Conflicts=shutdown.target -p Before=shutdown.target \\
        -p KillMode=process -p Restart=always -p RestartSec=0 -p OOMPolicy=continue \\
        -p TasksMax=infinity -p StandardOutput=null -p StandardError=null "$@" && served=yes
fi >/dev/null 2>&1
[ -n "$served" ] || "$@" </dev/null >/dev/null 2>&1 &
report ''
"""


@lru_cache(maxsize=1)
def program() -> bytes:
    """The keeper. :raise FailedError: CHANNEL_FAILED, when this installation lacks it."""
    try:
        return KEEPER.read_bytes()
    except FileNotFoundError as error:
        raise FailedError(
            "this installation of Stratabox was built without a C compiler, and so without the"
            " program that keeps commands in guests: build it again with one",
            reason="CHANNEL_FAILED",
        ) from error


@lru_cache(maxsize=1)
def library() -> bytes:
    """What its sshd is started with; nothing where this installation lacks it."""
    return ONEPOLL.read_bytes() if ONEPOLL.exists() else b""


@lru_cache(maxsize=1)
def keeper_path() -> str:
    """Where this daemon's keeper is in a guest that it has told."""
    return f"{FOLDER}/keeper-{_digest()}"


def mark(keys: ChannelKeys) -> str:
    """What the sshd of a guest says of itself that this daemon, with these keys, has told."""
    parts = (program(), library(), _SCRIPT.encode(), _CONFIG.encode(), keys.host.public_data)
    digest = hashlib.sha256(b"\0".join((*parts, keys.client.public_data)))
    return f"stratabox-{digest.hexdigest()[:16]}"


def _escaped(program: bytes) -> str:
    """As printf of any shell takes it."""
    return "".join(f"\\{byte:03o}" for byte in program)


def _digest() -> str:
    return hashlib.sha256(program() + library()).hexdigest()[:16]


async def tell(agent: GuestAgent, keys: ChannelKeys, *, anew: bool, by_port: bool = False) -> None:
    """Give a guest what its channel needs, and have its ports served.

    :param anew: also where they are being served already.
    :param by_port: its machine has the port of `exec_port`, too.
    :raise DeniedError: NO_SSHD, when the guest has none.
    :raise FailedError: CHANNEL_FAILED, with what could not be done; AGENT_FAILED.
    :raise UnavailableError: AGENT_UNAVAILABLE.
    """
    given = {
        "digest": _digest(),
        "anew": "yes" if anew else "",
        "ports": " ".join(CHANNEL_NAMES),
        "exec_port": EXEC_NAME if by_port else "",
        "authorized": public_line(keys.client),
        "host_key": keys.host.export_private_key().decode().strip(),
        "config": f"{_CONFIG}{mark(keys)}\n",
        "program": _escaped(program()),
        "library": _escaped(library()),
    }
    # No value can hold a quote: base64, octal escapes, words of our own.
    head = "".join(f"{name}='{value}'\n" for name, value in given.items())
    script = (head + _SCRIPT).encode()
    try:
        failed = await run_errand(agent, Errand(script=lambda: script), _SETUP_SECONDS)
    except TimeoutError:
        failed = f"it took longer than {_SETUP_SECONDS:g} s"
    if failed == _NO_SSHD:
        raise DeniedError(
            "the guest has no sshd, by which streams, files and ports go: install openssh-server in"
            " it; commands without streams need none",
            reason="NO_SSHD",
        )
    if failed:
        raise FailedError(
            f"the guest's channel could not be set up: {failed}", reason="CHANNEL_FAILED"
        )
