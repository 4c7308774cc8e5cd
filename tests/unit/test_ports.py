"""What may be forwarded, and who may log in: decided without any guest."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import asyncssh
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratabox.daemon import config
from stratabox.daemon.lifecycle.inside import endpoints, keys
from stratabox.daemon.lifecycle.inside.dialing import user_from
from stratabox.daemon.lifecycle.inside.endpoints import Rules, checked, require_allowed
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError
from stratabox.storage.model.ports import Endpoint

NOTHING = Rules(networks=(), folders=())


def tcp(address: str, port: int = 80) -> Endpoint:
    return Endpoint(address=address, port=port)


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("", "127.0.0.1:80"),
        ("localhost", "127.0.0.1:80"),
        ("127.1.2.3", "127.1.2.3:80"),
        ("::1", "[::1]:80"),
        ("0:0:0:0:0:0:0:1", "[::1]:80"),
        ("::ffff:127.0.0.1", "127.0.0.1:80"),
    ],
)
def test_loopback_is_always_allowed(given: str, spelled: str) -> None:
    endpoint = checked(tcp(given), listens=True, what="host")
    assert str(endpoint) == spelled
    require_allowed(endpoint, NOTHING, listens=True)


@given(st.ip_addresses())
def test_other_addresses_take_a_rule(address: ipaddress.IPv4Address) -> None:
    endpoint = checked(tcp(str(address)), listens=True, what="host")
    spelled = ipaddress.ip_address(endpoint.address)
    if spelled.is_loopback:
        return
    with pytest.raises(DeniedError) as caught:
        require_allowed(endpoint, NOTHING, listens=True)
    assert caught.value.reason == "PORT_NOT_ALLOWED"
    require_allowed(
        endpoint, Rules(networks=(ipaddress.ip_network(spelled),), folders=()), listens=True
    )


@pytest.mark.parametrize(
    "bad", ["example.org", "127.0.0.1 ", "fe80::1%eth0", "1.2.3", "0x7f000001", "127.0.0.1\0", "*"]
)
def test_what_is_no_address(bad: str) -> None:
    with pytest.raises(InvalidArgumentError):
        checked(tcp(bad), listens=True, what="host")


def test_ports() -> None:
    assert checked(tcp("", 0), listens=True, what="host").port == 0
    for port, listens in ((0, False), (65536, True), (65536, False)):
        with pytest.raises(InvalidArgumentError):
            checked(tcp("", port), listens=listens, what="host")


def test_paths(tmp_path: Path) -> None:
    assert checked(Endpoint(path="/a/../b//c"), listens=True, what="host").path == "/b/c"
    for bad in ("a", "./a", "/" + "x" * 107, "/a\n", "/a\0b", "/\x1b[2J"):
        with pytest.raises(InvalidArgumentError):
            checked(Endpoint(path=bad), listens=True, what="host")
    with pytest.raises(InvalidArgumentError):
        checked(Endpoint(path="/a", port=1), listens=True, what="host")
    for mode in (-1, 0o1777):
        with pytest.raises(InvalidArgumentError):
            endpoints.mode_from(mode)
    assert (endpoints.mode_from(0), endpoints.mode_from(0o660)) == (0o600, 0o660)


def test_folders_hold_also_behind_links(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "out").symlink_to("/run")
    rules = Rules(networks=(), folders=(tmp_path / "mine",))
    require_allowed(Endpoint(path=f"{tmp_path}/mine/a.sock"), rules, listens=True)
    require_allowed(
        Endpoint(path="/anywhere/a.sock"), Rules(networks=(), folders=None), listens=True
    )
    for path in (f"{tmp_path}/a.sock", f"{tmp_path}/mine/out/a.sock", f"{tmp_path}/mine2/a"):
        with pytest.raises(DeniedError, match=r"ports\.sockets"):
            require_allowed(Endpoint(path=path), rules, listens=True)


@pytest.mark.parametrize(
    ("flags", "folders"),
    [
        ([], None),
        (["--ports-sockets=none"], []),
        (["--ports-sockets=any", "--socket-mode=0666"], None),
        (["--socket-mode=0666"], []),
        (["--socket-group=0"], []),
        (["--address=http://127.0.0.1:7777"], []),
        (["--ports-sockets=/a:/b c"], [Path("/a"), Path("/b c")]),
    ],
)
def test_sockets_by_configuration(
    flags: list[str], folders: list[Path] | None, tmp_path: Path
) -> None:
    rules = endpoints.rules_of(config.load([f"--state-dir={tmp_path}", *flags], {}, root=True))
    assert rules.folders is folders or list(rules.folders or ()) == folders


def test_addresses_by_configuration(tmp_path: Path) -> None:
    flag = "--ports-addresses=0.0.0.0, 192.0.2.0/24,2001:db8::/32"
    made = config.load([f"--state-dir={tmp_path}", flag], {}, root=True)
    rules = endpoints.rules_of(made)
    for address in ("0.0.0.0", "192.0.2.7", "2001:db8::7"):
        require_allowed(tcp(address), rules, listens=True)
    for address in ("192.0.3.7", "::"):
        with pytest.raises(DeniedError):
            require_allowed(tcp(address), rules, listens=True)
    (shown,) = (each.value for each in made.settings() if each.key == "ports.addresses")
    assert shown == '"0.0.0.0/32, 192.0.2.0/24, 2001:db8::/32"'
    for bad in ("--ports-addresses=x", "--ports-addresses=10.0.0.1/8", "--ports-sockets=a:/b"):
        with pytest.raises(InvalidArgumentError):
            config.load([f"--state-dir={tmp_path}", bad], {}, root=True)


def test_loopback_is_not_led_to_by_whoever_is_elsewhere(tmp_path: Path) -> None:
    flags = [f"--state-dir={tmp_path}", "--listen=https://192.0.2.1:7777"]
    rules = endpoints.rules_of(config.load(flags, {}, root=True))
    require_allowed(tcp("127.0.0.1"), rules, listens=True)
    with pytest.raises(DeniedError):
        require_allowed(tcp("127.0.0.1"), rules, listens=False)
    assert rules.folders == ()
    flags.append("--ports-addresses=127.0.0.1")
    rules = endpoints.rules_of(config.load(flags, {}, root=True))
    require_allowed(tcp("127.0.0.1"), rules, listens=False)


def test_public_keys() -> None:
    made = {
        kind: asyncssh.generate_private_key(kind)
        for kind in ("ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa")
    }
    for key in made.values():
        line = key.export_public_key().decode().strip()
        assert keys.checked(f"  {line} some comment \n") == f"{line} some comment"
        assert keys.fingerprint(line) == key.get_fingerprint()
    line = made["ssh-ed25519"].export_public_key().decode().strip()
    assert keys.all_checked([line, f"{line} again"]) == [f"{line} again"]
    weak = asyncssh.generate_private_key("ssh-rsa", key_size=1024).export_public_key().decode()
    kind, base64 = line.split()[:2]
    for bad in (
        "", "x", kind, f"{kind} AAAA", f"restrict {line}", f"{line} a\nssh-rsa AAAA", weak,
        f"ssh-dss {base64}", f"ssh-rsa {base64}", f"{kind} {base64[:-8]}", "x" * 9000,
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError):
            keys.checked(bad)
    with pytest.raises(InvalidArgumentError):
        keys.all_checked([line] * 65)


def test_users() -> None:
    assert [user_from(name) for name in ("", "bob", "a.b-c_d$")] == ["root", "bob", "a.b-c_d$"]
    for bad in ("-x", "a b", "a,b", "*", "a\n", "!root", "a@b", "x" * 65, "$"):
        with pytest.raises(InvalidArgumentError):
            user_from(bad)
