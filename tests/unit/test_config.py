"""Where each value comes from, what is refused and how that is said."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from stratabox.daemon import __main__ as strataboxd
from stratabox.daemon.config import Config, Setting, load
from stratabox.daemon.config.keys import KEYS, UID_COUNT, AcceleratorWish
from stratabox.daemon.config.kinds import TcpAddress, UnixAddress
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.states import Level


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def sources(config: Config) -> dict[str, str]:
    return {setting.key: setting.source for setting in config.settings()}


def refused(*argv: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        load(argv, environ or {}, root=True)
    assert caught.value.reason == "INVALID_CONFIG"
    return caught.value.message


def test_every_key_is_a_field_and_every_field_a_key() -> None:
    fields = {field.name for field in dataclasses.fields(Config)} - {"sources"}
    assert fields == {key.field for key in KEYS}


def test_defaults_of_root() -> None:
    config = load([], {}, root=True)
    assert config.state_dir == Path("/var/lib/stratabox")
    assert config.address == UnixAddress(Path("/run/stratabox/api.sock"))
    assert config.libvirt_uri == "qemu:///system"
    assert config.socket_mode == 0o660
    assert config.socket_group is None
    assert config.default_image is None
    assert config.build_cache is None
    assert config.default_level is Level.APPLICATION
    assert (config.default_cpus, config.default_memory, config.default_storage) == (1, 512, 0)
    timeouts = (config.ready_timeout, config.stop_timeout, config.freeze_timeout)
    assert timeouts == (180.0, 60.0, 30.0)
    assert set(sources(config).values()) == {"default"}


def test_defaults_of_a_user() -> None:
    config = load([], {"HOME": "/home/ann"}, root=False)
    assert config.state_dir == Path("/home/ann/.local/share/stratabox")
    assert config.address == UnixAddress(config.state_dir / "api.sock")
    assert config.libvirt_uri == "qemu:///session"


def test_xdg_folders_count_unless_relative() -> None:
    environ = {"HOME": "/home/ann", "XDG_DATA_HOME": "/data", "XDG_RUNTIME_DIR": "/run/user/7"}
    config = load([], environ, root=False)
    assert config.state_dir == Path("/data/stratabox")
    assert config.address == UnixAddress(Path("/run/user/7/stratabox/api.sock"))
    config = load([], environ | {"XDG_DATA_HOME": "data", "XDG_RUNTIME_DIR": ""}, root=False)
    assert config.address == UnixAddress(Path("/home/ann/.local/share/stratabox/api.sock"))


def test_a_state_dir_that_was_set_takes_the_socket_along(tmp_path: Path) -> None:
    runtime = {"XDG_RUNTIME_DIR": "/run/user/7"}
    file = write(tmp_path, 'state_dir = "/srv/c"')
    for config, folder in (
        (load(["--state-dir", "/srv/a"], runtime, root=True), "/srv/a"),
        (load([], runtime | {"STRATABOX_STATE_DIR": "/srv/b"}, root=False), "/srv/b"),
        (load(["--config", str(file)], runtime, root=False), "/srv/c"),
    ):
        assert config.address == UnixAddress(Path(folder, "api.sock"))
        assert sources(config)["address"] == "default"


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path, "default_cpus = 2\ndefault_memory = 600\ndefault_storage = 3\n")
    environ = {
        "STRATABOX_CONFIG": str(file),
        "STRATABOX_DEFAULT_CPUS": "4",
        "STRATABOX_DEFAULT_MEMORY": "700",
        "STRATABOX_ACCEL": "",
    }
    config = load(["--default-cpus=8"], environ, root=True)
    assert (config.default_cpus, config.default_memory, config.default_storage) == (8, 700, 3)
    assert config.accel is AcceleratorWish.AUTO
    found = sources(config)
    assert found["default_cpus"] == "flag --default-cpus"
    assert found["default_memory"] == "environment STRATABOX_DEFAULT_MEMORY"
    assert found["default_storage"] == f"file {file}"
    assert found["accel"] == "default"


def test_an_empty_flag_unsets_what_the_file_sets(tmp_path: Path) -> None:
    file = write(tmp_path, 'default_image = "debian"')
    assert load(["--config", str(file)], {}).default_image == "debian"
    assert load(["--config", str(file), "--default-image="], {}).default_image is None


def test_the_default_file_of_a_user_is_read(tmp_path: Path) -> None:
    (tmp_path / ".config/stratabox").mkdir(parents=True)
    file = write(tmp_path / ".config/stratabox", "default_cpus = 5")
    # The socket elsewhere: this folder's path can be too long for one.
    environ = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": "/run/user/7"}
    config = load([], environ, root=False)
    assert config.default_cpus == 5
    assert sources(config)["default_cpus"] == f"file {file}"


def test_a_named_file_must_exist_and_be_toml(tmp_path: Path) -> None:
    absent = tmp_path / "none.toml"
    assert refused("--config", str(absent)) == (
        f"configuration file {absent} (named by --config) does not exist"
    )
    assert "STRATABOX_CONFIG" in refused(environ={"STRATABOX_CONFIG": str(absent)})
    assert "cannot be read" in refused("--config", str(tmp_path))
    assert "is not TOML" in refused("--config", str(write(tmp_path, "default_cpus =")))
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    assert "is not TOML" in refused("--config", str(tmp_path / "config.toml"))


def test_unknown_keys_are_refused_with_a_guess(tmp_path: Path) -> None:
    file = write(tmp_path, "default-cpu = 2\n[zzz]\ny = 1\n")
    assert refused("--config", str(file)).splitlines() == [
        f'unknown key "default-cpu" in {file}; did you mean "default_cpus"?',
        f'unknown key "zzz.y" in {file}',
    ]


def test_a_dotted_key_is_a_row_of_a_table(tmp_path: Path) -> None:
    for text in ("admission.memory = '2GiB'\n", "[admission]\nmemory = '2GiB'\n"):
        config = load(["--config", str(write(tmp_path, text))], {}, root=True)
        assert config.admission_memory == 2 << 30
    assert load([], {"STRATABOX_ADMISSION_MEMORY": "1GiB"}).admission_memory == 1 << 30
    assert "admission" in refused("--config", str(write(tmp_path, "admission = 3\n")))
    assert '"admission"' in refused("--config", str(write(tmp_path, "[admission]\n")))


def test_every_wrong_value_is_told_at_once_with_its_source() -> None:
    message = refused("--default-cpus", "33", environ={"STRATABOX_DEFAULT_MEMORY": "127"})
    assert message.splitlines() == [
        'default_cpus = "33" (flag --default-cpus): allowed: 1 to 32',
        'default_memory = "127" (environment STRATABOX_DEFAULT_MEMORY): allowed: 128 to 32768 MiB',
    ]


def test_unknown_and_shortened_flags_are_refused() -> None:
    assert "--cpus" in refused("--cpus", "3")
    assert "--default-cp" in refused("--default-cp", "3")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("default_cpus = 0", "1 to 32"),
        ("default_cpus = true", "whole number"),
        ("default_cpus = 1.5", "whole number"),
        ('default_cpus = "two"', "whole number"),
        ("default_storage = -1", "0 to 16384 GiB"),
        ('ready_timeout = "0s"', "1s to 24h"),
        ('ready_timeout = "soon"', "duration"),
        ("ready_timeout = nan", "duration"),
        ("ready_timeout = [1]", "duration"),
        ('socket_mode = "0888"', "octal"),
        ("socket_mode = 0o660", "string"),
        ('socket_mode = "0077"', "octal"),
        ('socket_group = "no-such-group-here"', "no such group"),
        ('launcher = "docker"', '"qemu" or "libvirt"'),
        ('default_level = "full"', '"crash", "application" or "memory"'),
        ('libvirt_uri = "qemu+ssh://far/system"', "this host"),
        ('qemu_binary = "./qemu"', "absolute"),
        ('state_dir = "state"', "absolute path"),
        ('state_dir = "/"', "absolute path"),
        ('state_dir = ""', "absolute path"),
        ('state_dir = "/a\\u0000b"', "control characters"),
        ('default_image = "a\\nb"', "control characters"),
        ('max_image_bytes = "1XB"', "64GiB"),
        ("uid_base = 1000", "65536 to"),
        ("uid_base = 2147352576", "65536 to"),
        ('address = "tcp://127.0.0.1:1"', "unix:///PATH"),
        ('address = "unix:relative"', "unix:///PATH"),
        ('address = "http://127.0.0.1"', "unix:///PATH"),
        ('address = "http://127.0.0.1:0"', "unix:///PATH"),
        ('address = "http://127.0.0.1:99999"', "unix:///PATH"),
        ('address = "http://127.0.0.1:80/path"', "unix:///PATH"),
        ('address = "http://0.0.0.0:80"', "without TLS only loopback"),
        ('address = "http://example.com:80"', "without TLS only loopback"),
        ('address = "http://[::]:80"', "without TLS only loopback"),
        (f'address = "unix:///{"a" * 107}"', "107 bytes"),
    ],
)
def test_bad_values(tmp_path: Path, line: str, says: str) -> None:
    message = refused("--config", str(write(tmp_path, line)))
    assert message.startswith(line.partition(" ")[0])
    assert "config.toml" in message
    assert says in message


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("--ready-timeout", "90", 90.0),
        ("--ready-timeout", "1h30m", 5400.0),
        ("--ready-timeout", "1500ms", 1.5),
        ("--max-image-bytes", "2G", 2 << 30),
        ("--max-image-bytes", "1 TiB", 1 << 40),
        ("--max-image-bytes", "1048577", 1048577),
        ("--socket-mode", "600", 0o600),
        ("--socket-group", "0", "0"),
        ("--address", "http://[::1]:8080", TcpAddress("::1", 8080)),
        ("--address", "http://localhost:8080/", TcpAddress("localhost", 8080)),
        ("--address", "unix:///tmp/a.sock", UnixAddress(Path("/tmp/a.sock"))),
    ],
)
def test_good_values(flag: str, text: str, value: object) -> None:
    config = load([flag, text], {}, root=True)
    assert getattr(config, flag[2:].replace("-", "_")) == value


def test_paths_know_the_home_folder() -> None:
    assert load(["--build-cache", "~/cache"], {}).build_cache == Path("~/cache").expanduser()


def test_settings_are_toml_that_gives_the_same_configuration(tmp_path: Path) -> None:
    changed = ["--ready-timeout=1500ms", "--max-image-bytes=1048577", "--address=http://[::1]:80"]
    config = load(changed, {}, root=True)
    text = "".join(f"{setting.key} = {setting.value}\n" for setting in config.settings())
    assert set(tomllib.loads(text)) == {key.name.partition(".")[0] for key in KEYS}
    again = load(["--config", str(write(tmp_path, text))], {}, root=True)
    assert dataclasses.replace(again, sources=config.sources) == config


def test_default_uids_are_clear_of_subordinate_ones() -> None:
    base = load([], {}, root=True).uid_base
    assert 2_000_200_000 < base < base + UID_COUNT <= 0x7FFE0000


def test_config_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert strataboxd.main(["--default-cpus=2", "config", "show", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    expected = Setting(key="default_cpus", value="2", source="flag --default-cpus")
    assert dataclasses.asdict(expected) in settings
    assert strataboxd.main(["config", "show", "--default-cpus=3"]) == 0
    assert "# flag --default-cpus" in capsys.readouterr().out


def test_a_wrong_configuration_ends_strataboxd(capsys: pytest.CaptureFixture[str]) -> None:
    assert strataboxd.main(["--default-cpus=33"]) == 2
    printed = capsys.readouterr()
    assert printed.err == (
        'strataboxd: default_cpus = "33" (flag --default-cpus): allowed: 1 to 32\n'
    )
    assert not printed.out
