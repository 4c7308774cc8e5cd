"""The same key again gives the same thing; another request under it is refused."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratabox.daemon.api import convert
from stratabox.daemon.lifecycle.common.once import Key
from stratabox.storage.catalog import idempotency, sandboxes
from stratabox.storage.catalog.database import Catalog, text_of
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.ids import SandboxId, mint
from stratabox.v1 import sandboxes_pb2
from support.records import Maker

KEY = Key(key="k", method="Create", request="hash")


def test_a_key_is_new_then_known_then_free(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        assert KEY.recall(tx) is None
        KEY.remember(tx, sandbox="s", snapshot="p")
        assert KEY.recall(tx) == {"sandbox": "s", "snapshot": "p"}
        idempotency.forget(tx, "other")
        assert KEY.recall(tx) is not None
        idempotency.forget(tx, "k")
        assert KEY.recall(tx) is None


@pytest.mark.parametrize(
    "other",
    [
        Key(key="k", method="Clone", request="hash"),
        Key(key="k", method="Create", request="other"),
    ],
)
def test_another_request_under_the_key_is_refused(catalog: Catalog, other: Key) -> None:
    with catalog.transaction() as tx:
        KEY.remember(tx, sandbox="s")
        with pytest.raises(InvalidArgumentError) as caught:
            other.recall(tx)
    assert caught.value.reason == "IDEMPOTENCY_MISMATCH"
    assert caught.value.metadata == {"idempotency_key": "k"}
    assert "Create" in caught.value.message


def test_a_key_is_bound_with_what_it_makes_or_not_at_all(catalog: Catalog, maker: Maker) -> None:
    def fail() -> None:
        with catalog.transaction() as tx:
            made = sandboxes.insert(tx, maker.sandbox())
            KEY.remember(tx, sandbox=made.id)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    with catalog.transaction() as tx:
        assert KEY.recall(tx) is None
        assert sandboxes.everything(tx) == []


def test_what_was_undone_frees_its_keys(catalog: Catalog) -> None:
    one, two = SandboxId(mint()), SandboxId(mint())
    with catalog.transaction() as tx:
        idempotency.remember(tx, "a", "m", "r", {"sandbox": one})
        idempotency.remember(tx, "b", "m", "r", {"sandbox": two})
        idempotency.remember(tx, "c", "m", "r", {"snapshot": one})
        idempotency.remember(tx, "d", "m", "r", {})
        idempotency.forget_outcome(tx, "sandbox", one)
        known = [key for key in "abcd" if idempotency.recall(tx, key, "m", "r") is not None]
    assert known == ["b", "c", "d"]


def test_keys_are_kept_for_their_time_and_no_longer(catalog: Catalog) -> None:
    day = timedelta(hours=24)
    second = timedelta(microseconds=1)
    with catalog.transaction() as tx:
        for key, age in (("old", day + second), ("just", day), ("new", timedelta(0))):
            idempotency.remember(tx, key, "m", "r", {})
            tx.execute(
                "UPDATE idempotency SET created_at = ? WHERE key = ?", (text_of(tx.now - age), key)
            )
        idempotency.expire(tx, day)
        known = [key for key in ("old", "just", "new") if idempotency.recall(tx, key, "m", "r")
                 is not None]  # fmt: skip
    assert known == ["just", "new"]


# -- the key of a message -------------------------------------------------------------------------


def request(key: str = "", **fields: object) -> sandboxes_pb2.CreateSandboxRequest:
    return sandboxes_pb2.CreateSandboxRequest(idempotency_key=key, **fields)  # type: ignore[arg-type]


def test_no_key_is_none() -> None:
    assert convert.key_from("Create", request(name="n")) is None


def test_the_hash_is_of_everything_but_the_key() -> None:
    one = convert.key_from("Create", request("a", name="n"))
    two = convert.key_from("Create", request("b", name="n"))
    other = convert.key_from("Create", request("a", name="m"))
    assert one
    assert two
    assert other
    assert (one.key, one.method, one.request) == ("a", "Create", two.request)
    assert one.request != other.request


@settings(deadline=None)
@given(env=st.dictionaries(st.text("abc", min_size=1), st.text("xyz"), max_size=6), data=st.data())
def test_the_order_of_a_map_makes_no_other_request(
    env: dict[str, str], data: st.DataObject
) -> None:
    shuffled = dict(data.draw(st.permutations(sorted(env.items()))))
    assert convert.key_from("m", request("k", env=env)) == convert.key_from(
        "m", request("k", env=shuffled)
    )


def test_the_request_itself_is_not_changed() -> None:
    message = request("k", name="n")
    convert.key_from("Create", message)
    assert message == request("k", name="n")


def test_a_key_has_a_longest_length_in_bytes() -> None:
    assert convert.key_from("m", request("k" * 256)) is not None
    for text in ("k" * 257, "é" * 129):
        with pytest.raises(InvalidArgumentError):
            convert.key_from("m", request(text))
