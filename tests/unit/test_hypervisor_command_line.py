"""What QEMU is started with: pure functions of the spec."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stratabox.daemon.hypervisor import command_line
from stratabox.daemon.hypervisor.machine import ChainLayer, DomainDisk, DomainSpec
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.ids import LayerId, SandboxId, Sha256, mint
from stratabox.storage.model.records import KernelBoot, Machine

NASTY = 'console=ttyS0,x "y" \\ é'


class NamedFiles:
    """Files by names that tell them apart."""

    def firmware_dir(self) -> str:
        return "FIRMWARE"

    def ram(self) -> str:
        return "RAM"

    def bios(self) -> str:
        return "BIOS"

    def kernel(self) -> str:
        return "KERNEL"

    def initrd(self) -> str:
        return "INITRD"

    def seed(self) -> str:
        return "SEED"

    def layer(self, layer: ChainLayer, *, active: bool) -> str:
        return f"{'rw' if active else 'ro'}:{layer.path}"

    def listener(self, name: str) -> str:
        return f"fd={len(name)}"

    def network(self, name: str) -> Mapping[str, str]:
        return {"type": "fd", "str": str(len(name))}

    def extra(self) -> Sequence[str]:
        return ("-add-fd", "fd=3,set=1")


def layer() -> ChainLayer:
    return ChainLayer(id=LayerId(mint()), path=Path(f"/layers/{mint()}"))


def make_spec(*chains: Sequence[ChainLayer], kernel: bool = True) -> DomainSpec:
    machine = Machine(
        machine_type="pc-q35-7.2",
        accelerator="tcg",
        cpu_model="max",
        qemu_version="7.2.0",
        firmware={"bios-256k.bin": Sha256("0" * 64)},
        mac="52:54:00:12:34:56",
        kernel_boot=KernelBoot(kernel=Sha256("1"), initrd=Sha256("2"), command_line=NASTY)
        if kernel
        else None,
    )
    return DomainSpec(
        sandbox=SandboxId(mint()),
        machine=machine,
        cpus=3,
        memory=512,
        vmgenid=mint(),
        disks=[
            DomainDisk(index=index, serial=f"serial,{index}", chain=chain)
            for index, chain in enumerate(chains)
        ],
        firmware_dir=Path("/fw"),
        kernel=Path("/k") if kernel else None,
        initrd=Path("/i") if kernel else None,
        folder=Path("/run/x,y"),
        uid=None,
    )


def values(arguments: Sequence[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(arguments) if name == option]


def devices(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {each["id"]: each for each in map(json.loads, values(arguments, "-device"))}


def test_a_seed_lies_behind_all_disks_and_is_not_written() -> None:
    spec = make_spec([layer()])
    assert "seed" not in devices(command_line.build(spec, "name", NamedFiles()))
    spec = replace(spec, machine=replace(spec.machine, seed=Sha256("5")), seed=Path("/s"))
    arguments = command_line.build(spec, "name", NamedFiles())
    found = devices(arguments)
    # Guests number disks by these: the root disk stays the first.
    behind = int(found["disk0"]["addr"], 16) + command_line.MAX_DISKS
    assert int(found["seed"]["addr"], 16) == behind
    assert "bootindex" not in found["seed"]
    nodes = {each["node-name"]: each for each in map(json.loads, values(arguments, "-blockdev"))}
    node = nodes[found["seed"]["drive"]]
    assert (node["driver"], node["filename"], node["read-only"]) == ("file", "SEED", True)


def test_a_card_is_wired_to_a_socket_and_the_guest_sees_the_same() -> None:
    spec = make_spec([layer()])
    old = command_line.build(spec, "name", NamedFiles())
    assert values(old, "-netdev") == ["user,id=net,restrict=on"], "as memory of before wants it"
    new = replace(spec, machine=replace(spec.machine, uplink=True))
    arguments = command_line.build(new, "name", NamedFiles())
    (wire,) = map(json.loads, values(arguments, "-netdev"))
    address = {"type": "fd", "str": str(len("net.sock"))}
    assert wire == {"type": "stream", "id": "net", "server": True, "addr": address}
    assert devices(arguments) == devices(old)


def test_the_guest_cannot_tell_which_host_starts_it() -> None:
    spec = make_spec([layer()], [layer()])
    arguments = command_line.build(spec, "name", NamedFiles())
    assert values(arguments, "-machine")[0].startswith("pc-q35-7.2,memory-backend=ram,pflash0=fw")
    addresses = {
        name: device["addr"] for name, device in devices(arguments).items() if "addr" in device
    }
    assert addresses == {
        "rng0": "0x2", "serial0": "0x3", "net0": "0x4", "panic": "0x5",
        "disk0": "0x8", "disk1": "0x9",
    }  # fmt: skip
    assert devices(arguments)["net0"]["romfile"] == ""
    assert devices(arguments)["genid"]["guid"] == spec.vmgenid
    assert "-no-reboot" not in arguments
    assert "-S" in arguments


def test_the_whole_chain_is_spelled_out_from_the_image_up() -> None:
    active, sealed, image = layer(), layer(), layer()
    arguments = command_line.build(make_spec([active, sealed, image]), "name", NamedFiles())
    firmware, *nodes = map(json.loads, values(arguments, "-blockdev"))
    assert firmware["read-only"] is True
    assert [node["node-name"] for node in nodes] == [image.node, sealed.node, active.node]
    assert [node["backing"] for node in nodes] == [None, image.node, sealed.node]
    assert [node["read-only"] for node in nodes] == [True, True, False]
    assert [node["file"]["filename"][:2] for node in nodes] == ["ro", "ro", "rw"]
    for node in nodes:
        assert "read-only" not in node["file"]  # else it would not follow its parent
        assert (node["discard"], node["detect-zeroes"]) == ("ignore", "off")
        assert node["file"]["aio"] == "threads"
        assert node["file"]["locking"] == ("off" if node["read-only"] else "on")
        assert len(node["node-name"]) <= 31
    assert devices(arguments)["disk0"]["drive"] == active.node


def test_a_layer_under_two_disks_is_one_node() -> None:
    shared = layer()
    arguments = command_line.build(
        make_spec([layer(), shared], [layer(), shared]), "name", NamedFiles()
    )
    names = [json.loads(value)["node-name"] for value in values(arguments, "-blockdev")]
    assert names.count(shared.node) == 1


def test_no_text_breaks_out_of_its_value() -> None:
    spec = make_spec([layer()])
    arguments = command_line.build(spec, "name", NamedFiles())
    assert values(arguments, "-append") == [f"{NASTY} no_timer_check"]
    assert devices(arguments)["disk0"]["serial"] == "serial,0"


def test_only_an_emulated_cpu_is_not_timed() -> None:
    spec = make_spec([layer()])
    spec = replace(spec, machine=replace(spec.machine, accelerator="kvm"))
    assert values(command_line.build(spec, "name", NamedFiles()), "-append") == [NASTY]


@pytest.mark.parametrize(
    ("accelerator", "cpus", "version", "told"),
    [
        ("tcg", 2, "7.2.22", "tcg,thread=single"),
        ("tcg", 2, "8.1.9", "tcg,thread=single"),
        ("tcg", 2, "8.2.0", "tcg"),
        ("tcg", 2, "10.0.2", "tcg"),
        ("tcg", 1, "7.2.22", "tcg"),
        ("kvm", 2, "7.2.22", "kvm"),
    ],
)
def test_several_emulated_cpus_take_turns_where_they_must(
    accelerator: str, cpus: int, version: str, told: str
) -> None:
    spec = make_spec([layer()])
    machine = replace(spec.machine, accelerator=accelerator, qemu_version=version)
    arguments = command_line.build(replace(spec, machine=machine, cpus=cpus), "name", NamedFiles())
    assert values(arguments, "-accel") == [told]


def test_a_guest_that_boots_by_itself_gets_no_kernel() -> None:
    arguments = command_line.build(make_spec([layer()], kernel=False), "name", NamedFiles())
    assert not {"-kernel", "-initrd", "-append"} & set(arguments)


def test_limits() -> None:
    spec = make_spec([layer()])
    disk = replace(spec.disks[0], serial="x" * 21)
    with pytest.raises(InvalidArgumentError):
        command_line.build(replace(spec, disks=[disk]), "name", NamedFiles())
    with pytest.raises(InvalidArgumentError):
        command_line.build(make_spec(*[[layer()] for _ in range(17)]), "name", NamedFiles())
