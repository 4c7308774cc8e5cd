"""Where the SDK looks for the daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from stratabox.client import InvalidAddressError
from stratabox.client.addresses import default_address, grpc_target


def test_the_environment_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('address = "unix:///from/file"\nstate_dir = "/state"\n')
    env = {"STRATABOX_CONFIG": str(file), "STRATABOX_STATE_DIR": "/other"}
    both = env | {"STRATABOX_ADDRESS": "http://h:1"}
    assert default_address(both) == "http://h:1"
    assert default_address(env) == "unix:///from/file"


def test_the_state_folder_holds_a_socket(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('state_dir = "/state"\n')
    env = {"STRATABOX_CONFIG": str(file), "STRATABOX_STATE_DIR": "/other"}
    assert default_address(env) == "unix:///other/api.sock"
    del env["STRATABOX_STATE_DIR"]
    assert default_address(env) == "unix:///state/api.sock"


def test_defaults_of_root_and_of_others(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert default_address(home, uid=0) == "unix:///run/stratabox/api.sock"
    share = f"unix://{tmp_path}/.local/share/stratabox/api.sock"
    assert default_address(home, uid=1000) == share
    assert default_address(home | {"XDG_RUNTIME_DIR": "relative"}, uid=1000) == share
    data = home | {"XDG_DATA_HOME": "/data"}
    assert default_address(data, uid=1000) == "unix:///data/stratabox/api.sock"
    runtime = data | {"XDG_RUNTIME_DIR": "/run/user/1000"}
    assert default_address(runtime, uid=1000) == "unix:///run/user/1000/stratabox/api.sock"


def test_a_users_own_file_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "stratabox"
    folder.mkdir()
    (folder / "config.toml").write_text('address = "http://h:2"')
    assert default_address({"XDG_CONFIG_HOME": str(tmp_path)}, uid=1) == "http://h:2"


@pytest.mark.parametrize("text", ["address = 3", "address = ", "\udc80"])
def test_a_file_that_makes_no_sense(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidAddressError):
        default_address({"STRATABOX_CONFIG": str(file)})


def test_a_named_file_must_be_there() -> None:
    with pytest.raises(InvalidAddressError, match="not there"):
        default_address({"STRATABOX_CONFIG": "/no/such/file"})


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("unix:///run/a b.sock", "unix:///run/a%20b.sock"),
        ("http://host:7777", "host:7777"),
        ("http://[::1]:7777/", "[::1]:7777"),
        ("https://host:7777", "host:7777"),
    ],
)
def test_targets(address: str, target: str) -> None:
    assert grpc_target(address) == target


@pytest.mark.parametrize(
    "address",
    [
        *(
            "",
            "host:1",
            "ftp://h:1",
            "https://h",
            "http://h",
            "http://h:x",
            "http://u@h:1",
            "http://h:1/p",
        ),
        *("unix:relative", "unix://x", "unix:///" + "x" * 107),
    ],
)
def test_addresses_that_make_no_sense(address: str) -> None:
    with pytest.raises(InvalidAddressError):
        grpc_target(address)
