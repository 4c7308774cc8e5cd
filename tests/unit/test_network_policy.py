"""What a network policy may say, and what it opens."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratabox.daemon.config.network_kind import NetworkWish
from stratabox.daemon.hypervisor.network import addresses
from stratabox.daemon.hypervisor.network.policy import Policy
from stratabox.storage.catalog import networks
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.network import (
    MAX_RULES,
    NO_NETWORK,
    Network,
    NetworkMode,
    Rule,
    network,
)


def at(text: str) -> int:
    return int(ipaddress.IPv4Address(text))


def policy(*rules: str) -> Policy:
    return Policy([Rule.parse(rule) for rule in rules])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("public", "public"),
        ("public:443,80", "public:80,443"),
        ("Example.ORG.", "example.org"),
        ("*.example.org:443", "*.example.org:443"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("10.1.0.0/16:8000-8100,22", "10.1.0.0/16:22,8000-8100"),
        ("10.1.2.3/32", "10.1.2.3"),
        ("8.8.8.8:53-53", "8.8.8.8:53"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)
def test_rules_are_kept_in_their_own_words(text: str, kept: str) -> None:
    assert str(Rule.parse(text)) == kept
    assert str(Rule.parse(kept)) == kept


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ":80", "*", "*.", "*.*.example.org", "a.*.example.org", "exa mple.org", "-a.org",
        "example..org", ".example.org", "a" * 64 + ".org", "x." * 130 + "org", "http://example.org",
        "example.org:0", "example.org:65536", "example.org:80-", "example.org:90-80", "a.org:",
        "example.org:http", "10.1.2.3/16", "10.0.0.300", "10.0.0.0/33", "1.2.3", "::1", "[::1]:80",
        "2001:db8::/32", "127.0.0.1", "127.0.0.0/8", "0.0.0.0", "224.0.0.1", "255.255.255.255",
        "10.0.2.2", "10.0.2.0/24", "example.org:" + ",".join(map(str, range(1, 40))), "a" * 10_000,
        "example.org\n", "exam\0ple.org", "\uff11\uff10.0.0.1", "PUBLIC", "public.", "Public:80",
        "\uff50ublic",
    ],
)  # fmt: skip
def test_what_can_be_no_rule_is_told(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        network(NetworkMode.EGRESS, [text])
    assert refused.value.metadata["field"] == "network"


@given(st.text(max_size=80))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        rule = Rule.parse(text)
    except InvalidArgumentError:
        return
    assert Rule.parse(str(rule)) == rule


def test_a_policy_says_what_it_means() -> None:
    assert network(NetworkMode.NONE, []) == NO_NETWORK
    assert network(NetworkMode.EGRESS, ["A.org", "a.org", "public"]).allow == ("a.org", "public")
    for mode, allow in (
        (NetworkMode.EGRESS, []),
        (NetworkMode.NONE, ["public"]),
        (NetworkMode.EGRESS, [f"h{number}.org" for number in range(MAX_RULES + 1)]),
    ):
        with pytest.raises(InvalidArgumentError):
            network(mode, allow)


def test_the_catalog_and_the_configuration_keep_it() -> None:
    some = network(NetworkMode.EGRESS, ["*.example.org:443", "10.1.0.0/16"])
    for each in (None, NO_NETWORK, some):
        assert networks.load(networks.dump(each)) == each
    kind = NetworkWish()
    public = network(NetworkMode.EGRESS, ["public"])
    for text, read in (
        ("none", NO_NETWORK),
        ("egress", public),
        ("*.example.org:443  10.1.0.0/16", some),
    ):
        assert kind.parse(text) == read
        assert kind.parse(kind.toml(read).strip('"')) == read
    for wrong in ("", "everything!", "none egress:x", 1):
        with pytest.raises(ValueError, match=r"cannot be allowed|needs to be told|a string"):
            kind.parse(wrong)


SPECIAL = [
    "10.0.0.1", "10.255.255.53", "100.64.0.1", "100.100.100.200", "168.63.129.16", "169.254.169.1",
    "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.168.0.1", "192.168.255.255",
    "198.18.0.1", "198.51.100.1", "203.0.113.1",
]  # fmt: skip
CLOSED = [
    "0.0.0.0", "0.1.2.3", "10.0.2.2", "10.0.2.3", "10.0.2.15", "127.0.0.1", "127.255.255.255",
    "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "172.15.255.255", "172.32.0.0",
          "192.169.0.0", "223.255.255.255"]  # fmt: skip


def test_public_is_what_is_public() -> None:
    wide = policy("public", "0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1", "192.0.0.0/8", "8.0.0.0/6")
    for text in PUBLIC:
        assert policy("public").allows_address(at(text), 80), text
        assert wide.allows_address(at(text), None), text
    for text in SPECIAL + CLOSED:
        assert not policy("public").allows_address(at(text), 80), text
        assert not wide.allows_address(at(text), 80), text
        assert not wide.opens(at(text)), text


def test_guarded_addresses_open_by_their_own_cidr() -> None:
    for text in SPECIAL:
        own = policy(f"{text}/32:80")
        assert own.allows_address(at(text), 80)
        assert own.opens(at(text))
        assert not own.allows_address(at(text), 81)
        assert not own.allows_address(at(text), None), "a ping has no port"
        assert not own.allows_address(at(text) + 1, 80)
    assert policy("10.0.0.0/8").allows_address(at("10.200.0.1"), 1)
    for text in CLOSED:
        assert not policy("10.0.0.0/8", "public").allows_address(at(text), 80), text


def test_the_hosts_own_addresses_open_one_by_one() -> None:
    for wide in ("public", "8.8.8.0/24", "0.0.0.0/0"):
        assert not policy(wide).allows_address(at("8.8.8.8"), 80, is_host=True)
    assert not policy("192.168.7.0/24").allows_address(at("192.168.7.1"), 80, is_host=True)
    assert policy("192.168.7.1:80").allows_address(at("192.168.7.1"), 80, is_host=True)
    assert not policy("192.168.7.1:80").allows_address(at("192.168.7.1"), 81, is_host=True)


def test_names_are_exact_or_below() -> None:
    some = policy("example.org:443", "*.example.net")
    assert some.allows_name("example.org", 443)
    assert not some.allows_name("example.org", 80)
    for name in (
        "www.example.org",
        "example.net",
        "notexample.net",
        "example.org.evil.com",
        ".example.net",
    ):
        assert not some.allows_name(name, 443), name
        assert not some.answers(name), name
    assert some.allows_name("a.b.example.net", 1)
    assert policy("public").answers("whatever.it.is")
    assert not policy("public").pins("whatever.it.is")
    assert not policy("10.0.0.0/8").answers("example.org")


@given(st.integers(0, 2**32 - 1))
def test_the_ranges_are_what_the_standard_library_says(address: int) -> None:
    if addresses.is_public(address):
        # IANA's list; what is public here and not there would be a hole.
        assert ipaddress.IPv4Address(address).is_global
    assert addresses.is_public(address) + addresses.is_closed(address) <= 1


def test_the_shape_of_none() -> None:
    assert Network() == NO_NETWORK
    assert not policy().allows_address(at("8.8.8.8"), 80)
