"""Stock ssh, scp, sftp and rsync into guests that have no network and no sshd that listens."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stratabox.client import Client, Image, InvalidArgumentError, Sandbox
from support.daemon import DaemonProcess

PROGRAM = Path(sys.executable).with_name("stratabox")


@dataclass(frozen=True)
class User:
    """Somebody at the host, with a configuration folder of their own and `ssh-config`'s file."""

    home: Path
    address: str

    @property
    def config(self) -> Path:
        return self.home / "ssh config"

    @property
    def keys(self) -> Path:
        return self.home / "100% mine" / "stratabox" / "ssh"

    def run(
        self, *words: str | Path, code: int = 0, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        environment = {key: value for key, value in os.environ.items() if "STRATABOX" not in key}
        environment |= {"STRATABOX_ADDRESS": self.address}
        environment |= {"XDG_CONFIG_HOME": str(self.home / "100% mine"), "HOME": str(self.home)}
        done = subprocess.run(
            words, env=environment, input=stdin, capture_output=True, timeout=300, check=False
        )
        assert done.returncode == code, (words, done)
        return done

    def configure(self) -> str:
        text = self.run(PROGRAM, "ssh-config").stdout.decode()
        self.config.write_text(text)
        return text

    def ssh(self, *words: str | Path, code: int = 0, stdin: bytes = b"") -> bytes:
        return self.run("ssh", "-F", self.config, *words, code=code, stdin=stdin).stdout


@pytest.fixture
def user(shared_daemon: DaemonProcess, tmp_path: Path, module_box: Sandbox) -> User:
    made = User(tmp_path, shared_daemon.address)
    made.configure()
    return made


@pytest.fixture(scope="module")
def module_box(client: Client, tiny: Image) -> Iterator[Sandbox]:
    """With a name that can be a host's, and an environment."""
    with client.sandboxes.create(
        image=tiny.id, memory=256, name="ssh-box", env={"WORDS": "a  b's", "EMPTY": ""}
    ) as box:
        yield box


def make_key(folder: Path, name: str) -> Path:
    path = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


def test_ssh_runs_commands_as_if_there_were_a_network(user: User, module_box: Sandbox) -> None:
    noise = os.urandom(1 << 20)
    assert user.ssh("ssh-box", "cat", stdin=noise) == noise
    user.ssh(module_box.id, "exit 7", code=7)
    done = user.run(
        "ssh", "-F", user.config, "ssh-box", 'printf "%s|%s|" "$WORDS" "${EMPTY-unset}"; id -un >&2'
    )
    assert (done.stdout, done.stderr) == (b"a  b's||", b"root\n")
    assert user.ssh("-tt", "ssh-box", "tty").startswith(b"/dev/pts/")
    mode = (user.keys / "id_ed25519").stat().st_mode & 0o777
    assert mode == 0o600
    # A second session, of a guest that is known; nobody was asked anything and nothing was learnt.
    again = user.run("ssh", "-F", user.config, "-o", "LogLevel=INFO", "ssh-box", "true")
    assert b"added" not in again.stderr


def test_scp_and_sftp(user: User, tmp_path: Path) -> None:
    source, back = tmp_path / "a file", tmp_path / "back"
    source.write_bytes(os.urandom(3 << 20))
    user.run("scp", "-F", user.config, source, "ssh-box:/root/there")
    user.run("scp", "-F", user.config, "ssh-box:/root/there", back)
    assert back.read_bytes() == source.read_bytes()
    batch = tmp_path / "batch"
    batch.write_text(f'put "{source}" /root/put\nget /root/put "{tmp_path}/got"\nrm /root/put\n')
    user.run("sftp", "-F", user.config, "-b", batch, "ssh-box")
    assert (tmp_path / "got").read_bytes() == source.read_bytes()


def test_rsync(user: User, module_box: Sandbox, tmp_path: Path) -> None:
    # The tiny guest has none: it gets the host's, with its libraries and their loader.
    rsync = Path(shutil.which("rsync") or "")
    kit = tmp_path / "rsync"
    kit.mkdir()
    shutil.copy(rsync, kit / "rsync")
    listed = subprocess.run(["ldd", rsync], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"(/\S+) \(0x", listed):
        shutil.copy(library, kit / Path(library).name)
    (loader,) = (each.name for each in kit.glob("ld-linux*"))
    (kit / "run").write_text(
        f'#!/bin/sh\nexec /root/rsync/{loader} --library-path /root/rsync /root/rsync/rsync "$@"\n'
    )
    (kit / "run").chmod(0o755)
    user.run("scp", "-q", "-r", "-F", user.config, kit, "ssh-box:/root/")
    tree = tmp_path / "tree"
    (tree / "sub folder").mkdir(parents=True)
    (tree / "sub folder" / "noise").write_bytes(os.urandom(1 << 20))
    (tree / "link").symlink_to("sub folder/noise")
    shell = ["-a", "--stats", "--rsync-path=/root/rsync/run", "-e", f"ssh -F '{user.config}'"]
    user.run("rsync", *shell, f"{tree}/", "ssh-box:/root/tree/")
    user.run("rsync", *shell, "ssh-box:/root/tree/", f"{tmp_path}/returned/")
    returned = tmp_path / "returned"
    assert (returned / "link").readlink() == Path("sub folder/noise")
    assert (returned / "link").read_bytes() == (tree / "link").read_bytes()
    # What has not changed is not sent again.
    stats = user.run("rsync", *shell, f"{tree}/", "ssh-box:/root/tree/").stdout
    assert b"Number of regular files transferred: 0" in stats


def test_one_connection_for_many(user: User, module_box: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "master"
    user.ssh(
        "-o", "ControlMaster=yes", "-o", f"ControlPath={path}", "-o", "ControlPersist=60",
        "-L", f"{tmp_path}/forwarded:/run/none", "-fN", "ssh-box",
    )  # fmt: skip
    assert path.is_socket()
    try:
        for word in ("one", "two"):
            assert user.ssh("-S", path, "ssh-box", f"echo {word}") == f"{word}\n".encode()
        assert (tmp_path / "forwarded").is_socket()
    finally:
        user.ssh("-S", path, "-O", "exit", module_box.id)


def test_sandbox_ssh(user: User, module_box: Sandbox) -> None:
    done = user.run(PROGRAM, "sandbox", "ssh", "ssh-box", "--", "echo", "$WORDS; exit 3", code=3)
    assert done.stdout == b"a b's\n"
    module_box.execute("sed -i '/^nobody/s,/bin/false,/bin/sh,' /etc/passwd").check()
    for words in ((module_box.id, "-l", "nobody"), ("nobody@ssh-box", "-T")):
        assert user.run(PROGRAM, "sandbox", "ssh", *words, "id", "-un").stdout == b"nobody\n"
    missing = user.run(PROGRAM, "sandbox", "ssh", "no-such-box", code=3)
    assert b"no-such-box" in missing.stderr


def test_authorized_keys(user: User, client: Client, module_box: Sandbox, tmp_path: Path) -> None:
    first, second = make_key(tmp_path, "first"), make_key(tmp_path, "second")
    public = {each: each.with_suffix(".pub").read_text() for each in (first, second)}
    # As somebody who has none of the keys that the proxy brings along.
    text = re.sub(r'IdentityFile ".*"', "IdentityFile none", user.config.read_text())
    user.config.write_text(text)
    user.ssh("-i", first, "ssh-box", "true", code=255)
    (key,) = module_box.ssh.set_authorized_keys([public[first]])
    assert (key.user, key.public_key) == ("root", public[first].strip())
    assert key.fingerprint.startswith("SHA256:")
    assert user.ssh("-i", first, "ssh-box", "id -un") == b"root\n"
    # Another user's are another's.
    module_box.ssh.set_authorized_keys([public[second]], user="nobody")
    assert [each.user for each in module_box.ssh.authorized_keys()] == ["nobody", "root"]
    assert len(module_box.ssh.authorized_keys(user="nobody")) == 1
    user.ssh("-i", second, "ssh-box", "true", code=255)
    module_box.execute("sed -i '/^nobody/s,/bin/false,/bin/sh,' /etc/passwd").check()
    assert user.ssh("-i", second, "nobody@ssh-box", "id -un") == b"nobody\n"
    # Nothing of it is in the guest, and copies have none.
    assert module_box.execute("grep -rl ssh-ed25519 /root /etc /home").stdout == b""
    shot = module_box.snapshot(name="keys")
    with client.snapshots.restore(shot.id, wait_for_ready=False) as copy:
        assert copy.ssh.authorized_keys() == []
    client.snapshots.delete(shot.id)
    assert user.run(PROGRAM, "sandbox", "ssh-key", "set", "ssh-box").stdout
    user.ssh("-i", first, "ssh-box", "true", code=255)
    for bad in ("", "no key", f'command="id" {public[first]}', public[first].replace("A", "", 5)):
        with pytest.raises(InvalidArgumentError):
            module_box.ssh.set_authorized_keys([bad])


def test_the_host_key_is_the_guests_own_and_pinned(
    user: User, module_box: Sandbox, tmp_path: Path
) -> None:
    own = make_key(tmp_path, "own")
    copied = {"K": own.read_text(), "P": own.with_suffix(".pub").read_text()}
    module_box.execute(
        'mkdir -p /etc/ssh; cd /etc/ssh; umask 077; printf %s "$K" >ssh_host_ed25519_key;'
        ' printf %s "$P" >ssh_host_ed25519_key.pub',
        env=copied,
    ).check()
    try:
        (told,) = module_box.ssh.host_keys()
        assert told.split() == copied["P"].split()[:2]
        # It has changed since the last session: the daemon says so before ssh looks.
        user.ssh("ssh-box", "true")
        pinned = (user.keys / "known_hosts" / module_box.id).read_text()
        assert pinned == f"stratabox-{module_box.id} {told}\n"
        # One that the daemon did not tell is not taken.
        other = make_key(tmp_path, "other").with_suffix(".pub").read_text().split()[:2]
        false = tmp_path / "false"
        false.write_text(f"stratabox-{module_box.id} {' '.join(other)}\n")
        refused = user.run(
            "ssh", "-F", user.config, "-o", f"UserKnownHostsFile={false}", "ssh-box", "true",
            code=255,
        )  # fmt: skip
        assert b"Host key verification failed" in refused.stderr
    finally:
        module_box.execute("rm -r /etc/ssh").check()


def test_only_running_sandboxes_are_hosts(user: User, module_box: Sandbox) -> None:
    assert f"\nHost {module_box.id} ssh-box\n" in user.configure()
    module_box.pause()
    assert module_box.id not in user.configure()
    module_box.resume()


def test_a_guest_without_sshd_says_so(user: User, module_box: Sandbox) -> None:
    module_box.execute("mv /usr/sbin/sshd /usr/sbin/sshd.away").check()
    try:
        done = user.run("ssh", "-F", user.config, "ssh-box", "true", code=255)
        assert b"has no sshd" in done.stderr
    finally:
        module_box.execute("mv /usr/sbin/sshd.away /usr/sbin/sshd").check()


def test_debian(user: User, debian_box: Sandbox) -> None:
    """With systemd."""
    user.configure()
    assert user.ssh(debian_box.id, "whoami; ls /dev/fd/0") == b"root\n/dev/fd/0\n"


def test_debian_commands(debian_box: Sandbox) -> None:
    """What goes by the same channel: it is there early in the boot, in a unit of its own."""
    unit = "systemctl show --property=ActiveState,After 'stratabox-channel-*.service'"
    shown = debian_box.execute(unit).check().stdout_text
    assert "ActiveState=active" in shown
    assert "basic.target" not in shown, "it waits for the end of the boot"
    with debian_box.spawn("cat; echo $0 >&2", stdin=True, user="nobody") as process:
        assert process.communicate(b"\0\xff") == (b"\0\xff", b"/bin/sh\n")
    with debian_box.spawn(["sh", "-c", "tty; stty size"], terminal=True) as process:
        said = process.communicate()[0].splitlines()
    assert said[0].startswith(b"/dev/pts/")
    assert said[1:] == [b"24 80"]
    name = debian_box.processes.start("echo begun; exec sleep 77777")
    debian_box.processes.signal(name, "KILL")
    assert debian_box.processes.wait(name).signal == 9
