"""What a caller's word means, and lists that neither lose nor repeat."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratabox.storage.catalog import images, lookup, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog, Transaction, json_of
from stratabox.storage.catalog.lookup import Page
from stratabox.storage.catalog.sandboxes import Filter
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError, NotFoundError
from stratabox.storage.model.ids import ImageId, SandboxId, SnapshotId, mint
from stratabox.storage.model.states import SandboxState, SnapshotState
from support.records import Maker

Put = Callable[..., SandboxId]


@pytest.fixture
def put(catalog: Catalog, maker: Maker) -> Put:
    def insert(**fields: object) -> SandboxId:
        with catalog.transaction() as tx:
            return sandboxes.insert(tx, maker.sandbox(**fields)).id

    return insert


def resolve(catalog: Catalog, reference: str) -> SandboxId:
    with catalog.transaction() as tx:
        return sandboxes.resolve(tx, reference)


# -- one record -----------------------------------------------------------------------------------

ONE = SandboxId("11111111-2222-4333-8444-555555555555")
TWO = SandboxId("11111111-2222-4333-8444-666666666666")
THREE = SandboxId("abcdef01-2222-4333-8444-555555555555")


def test_by_id_by_name_and_by_the_start_of_an_id(catalog: Catalog, put: Put) -> None:
    put(id=ONE, name="first")
    put(id=THREE, name="thírd one")
    for reference in (ONE, "first", "1111", ONE[:20], ONE[:35]):
        assert resolve(catalog, reference) == ONE
    for reference in ("thírd one", "abcd", "abcdef01-"):
        assert resolve(catalog, reference) == THREE


NOBODY = "c0ffee00-47a5-4c1e-8b4f-452499ea938e"


@pytest.mark.parametrize(
    "reference",
    ["", " ", "FIRST", "firs", "111", "1111x", "1111%", "%", "first\0", "11112", NOBODY, "'; --",
     "x" * 1_000_000, "1111" * 10, TWO, ONE.upper() + "0", "../first", "~", "----"],
    ids=lambda reference: ascii(reference)[:20],
)  # fmt: skip
def test_what_nothing_is_called(catalog: Catalog, put: Put, reference: str) -> None:
    put(id=ONE, name="first")
    with pytest.raises(NotFoundError) as caught:
        resolve(catalog, reference)
    assert caught.value.reason == "SANDBOX_NOT_FOUND"
    assert caught.value.metadata == {"sandbox": reference}


def test_each_noun_has_its_reason(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        with pytest.raises(NotFoundError) as image:
            images.resolve(tx, "none")
        with pytest.raises(NotFoundError) as snapshot:
            snapshots.resolve(tx, "none")
    assert image.value.reason == "IMAGE_NOT_FOUND"
    assert snapshot.value.reason == "SNAPSHOT_NOT_FOUND"


def test_an_id_goes_before_a_name_and_a_name_before_a_beginning(catalog: Catalog, put: Put) -> None:
    put(id=ONE, name="abcd")
    put(id=THREE, name=ONE)
    assert resolve(catalog, ONE) == ONE
    assert resolve(catalog, "abcd") == ONE
    assert resolve(catalog, "abcde") == THREE


def test_a_name_that_two_have_is_ambiguous(catalog: Catalog, put: Put) -> None:
    both = {put(name="twin"), put(name="twin")}
    with pytest.raises(DeniedError) as caught:
        resolve(catalog, "twin")
    assert caught.value.reason == "AMBIGUOUS_NAME"
    assert set(caught.value.metadata["ids"].split(",")) == both
    assert "2 sandbox records" in caught.value.message
    for one in both:
        assert resolve(catalog, one) == one


def test_a_beginning_that_two_have_is_ambiguous(catalog: Catalog, put: Put) -> None:
    put(id=ONE)
    put(id=TWO)
    with pytest.raises(DeniedError) as caught:
        resolve(catalog, "1111")
    assert caught.value.reason == "AMBIGUOUS_NAME"
    assert resolve(catalog, ONE[:25]) == ONE


def test_many_of_one_name_are_not_all_listed(catalog: Catalog, put: Put) -> None:
    for _ in range(30):
        put(name="many")
    with pytest.raises(DeniedError) as caught:
        resolve(catalog, "many")
    assert "more than 20" in caught.value.message
    assert len(caught.value.metadata["ids"].split(",")) == 20


def test_a_live_sandbox_goes_before_terminated_ones(catalog: Catalog, put: Put) -> None:
    gone = put(name="box", state=SandboxState.TERMINATED)
    assert resolve(catalog, "box") == gone
    live = put(name="box", state=SandboxState.STOPPED)
    put(name="box", state=SandboxState.TERMINATED)
    assert resolve(catalog, "box") == live
    put(name="box", state=SandboxState.FAILED)
    with pytest.raises(DeniedError):
        resolve(catalog, "box")


def test_a_ready_snapshot_goes_before_failed_ones(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        snapshots.insert(tx, maker.snapshot(state=SnapshotState.FAILED))
        ready = snapshots.insert(tx, maker.snapshot(state=SnapshotState.READY))
        snapshots.insert(tx, maker.snapshot(state=SnapshotState.CREATING))
        assert snapshots.resolve(tx, "point") == ready.id


# -- pages ----------------------------------------------------------------------------------------


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    ages=st.lists(st.integers(0, 4), max_size=12),
    later=st.lists(st.integers(0, 9), max_size=5),
    size=st.integers(1, 5),
)
def test_pages_lose_and_repeat_nothing_while_records_come(
    catalog: Catalog, maker: Maker, ages: list[int], later: list[int], size: int
) -> None:
    """Many have the same age; between two pages others come, younger or older."""

    def put(tx: Transaction, age: int) -> SandboxId:
        at = datetime.fromisoformat(f"2024-01-01T00:00:0{age}+00:00")
        return sandboxes.insert(tx, maker.sandbox(created_at=at)).id

    with catalog.transaction() as tx:
        tx.execute("DELETE FROM sandboxes")
        first = {put(tx, age) for age in ages}
    seen: list[tuple[datetime, str]] = []
    token = ""
    coming = iter(later)
    while True:
        with catalog.transaction() as tx:
            records, token = sandboxes.list_page(tx, Filter(), Page(size=size, token=token))
            assert len(records) == size or not token
            seen += [(record.created_at, record.id) for record in records]
            if not token:
                break
            for age in (age for age in [next(coming, None)] if age is not None):
                put(tx, age)
    assert seen == sorted(set(seen), reverse=True)
    assert first <= {one for _, one in seen}


def test_the_last_page_has_no_token(catalog: Catalog, put: Put) -> None:
    made = [put() for _ in range(4)]
    with catalog.transaction() as tx:
        newest, token = sandboxes.list_page(tx, Filter(), Page(size=2))
        oldest, end = sandboxes.list_page(tx, Filter(), Page(size=2, token=token))
        everything, none = sandboxes.list_page(tx, Filter(), Page(size=4))
    assert [record.id for record in newest + oldest] == made[::-1]
    assert [record.id for record in everything] == made[::-1]
    assert (end, none) == ("", "")


def test_a_page_is_bounded_where_none_is_named(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        for _ in range(lookup.DEFAULT_PAGE + 1):
            sandboxes.insert(tx, maker.sandbox())
        records, token = sandboxes.list_page(tx, Filter())
        assert len(records) == lookup.DEFAULT_PAGE
        rest, token = sandboxes.list_page(tx, Filter(), Page(token=token))
        assert (len(rest), token) == (1, "")


@pytest.mark.parametrize("size", [-1, lookup.LARGEST_PAGE + 1, -(2**31), 2**31 - 1])
def test_page_sizes_that_cannot_be(catalog: Catalog, size: int) -> None:
    with catalog.transaction() as tx, pytest.raises(InvalidArgumentError) as caught:
        images.list_page(tx, Page(size=size))
    assert str(size) in caught.value.message
    assert str(lookup.LARGEST_PAGE) in caught.value.message


def _encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


TIME = "2024-01-01T00:00:00.000000+00:00"


@pytest.mark.parametrize(
    "token",
    [
        "x", "====", "nonsense", "é", "\udcff", "\0", " ", "A" * 100_000,
        _encoded(" "), _encoded("one"), _encoded(f"{TIME} "), _encoded(f"{TIME} {ONE}x"),
        _encoded(f"yesterday {ONE}"), _encoded(f" {ONE}"), _encoded(f"{TIME}{ONE}"),
        _encoded(f"{TIME} {ONE}") + "!", "!" + _encoded(f"{TIME} {ONE}"),
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    ],
    ids=lambda token: ascii(token)[:20],
)  # fmt: skip
def test_tokens_that_are_not_ours(catalog: Catalog, token: str) -> None:
    with catalog.transaction() as tx, pytest.raises(InvalidArgumentError, match="page_token"):
        sandboxes.list_page(tx, Filter(), Page(token=token))


def test_a_token_of_a_record_that_is_gone_goes_on(catalog: Catalog, put: Put) -> None:
    made = [put() for _ in range(3)]
    with catalog.transaction() as tx:
        _, token = sandboxes.list_page(tx, Filter(), Page(size=1))
        sandboxes.delete(tx, made[2])
        rest, _ = sandboxes.list_page(tx, Filter(), Page(token=token))
    assert [record.id for record in rest] == [made[1], made[0]]


# -- filters --------------------------------------------------------------------------------------


def found(catalog: Catalog, wanted: Filter) -> set[SandboxId]:
    with catalog.transaction() as tx:
        return {record.id for record in sandboxes.list_page(tx, wanted)[0]}


def test_terminated_ones_are_listed_when_asked_for(catalog: Catalog, put: Put) -> None:
    live = put(state=SandboxState.RUNNING)
    gone = put(state=SandboxState.TERMINATED)
    assert found(catalog, Filter()) == {live}
    assert found(catalog, Filter(include_terminated=True)) == {live, gone}
    assert found(catalog, Filter(states=[SandboxState.TERMINATED])) == {gone}
    assert found(catalog, Filter(states=[SandboxState.TERMINATED, SandboxState.RUNNING])) == {
        live,
        gone,
    }
    assert found(catalog, Filter(states=[SandboxState.PAUSED])) == set()


def test_everything_given_must_fit(catalog: Catalog, put: Put) -> None:
    image = ImageId(mint())
    one = put(name="a", image=image, tags=("x", "y"), metadata={"k": "v", "l": "w"})
    two = put(name="a", tags=("x",), metadata={"k": "v"})
    put(name="b", tags=("xy",), metadata={"v": "k"})
    assert found(catalog, Filter(name="a")) == {one, two}
    assert found(catalog, Filter(image=image)) == {one}
    assert found(catalog, Filter(tags=["x"])) == {one, two}
    assert found(catalog, Filter(tags=["y", "x"])) == {one}
    assert found(catalog, Filter(metadata={"k": "v"})) == {one, two}
    assert found(catalog, Filter(metadata={"k": "v", "l": "w"}, name="a", tags=["y"])) == {one}
    assert found(catalog, Filter(metadata={"k": "w"})) == set()
    assert found(catalog, Filter(name="a'; DROP TABLE sandboxes; --")) == set()


letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")  # as policy has it
maps = st.dictionaries(
    st.text(letters, min_size=1, max_size=3)
    | st.sampled_from(['"', "\\", "'", "a.b", "$", "é", "1", "true"]),
    st.text(letters, max_size=2) | st.sampled_from(["1", "true", "null", '"', "[]", "é"]),
    max_size=3,
)


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(kept=maps, wanted=maps, data=st.data())
def test_metadata_fits_as_in_python(
    catalog: Catalog,
    maker: Maker,
    kept: dict[str, str],
    wanted: dict[str, str],
    data: st.DataObject,
) -> None:
    if kept and len(wanted) != 1:  # a part of what is kept, as often as not
        chosen: list[str] = data.draw(st.lists(st.sampled_from(sorted(kept))))
        wanted = {key: kept[key] for key in chosen}
    with catalog.transaction() as tx:
        tx.execute("DELETE FROM snapshots")
        snapshot = snapshots.insert(tx, maker.snapshot(metadata=kept))
        listed, _ = snapshots.list_page(tx, snapshots.Filter(metadata=wanted))
    fits = wanted.items() <= kept.items()
    assert [record.id for record in listed] == ([snapshot.id] if fits else []), json_of(kept)


def test_metadata_with_odd_characters_is_found(catalog: Catalog, put: Put) -> None:
    odd = {'quo"te': "back\\slash", "\n": "\u2028", "": "\x1f", "\U0001f600": "~"}
    one = put(metadata=odd)
    for key, value in odd.items():
        assert found(catalog, Filter(metadata={key: value})) == {one}, (key, value)


def test_snapshots_of_one_source(catalog: Catalog, maker: Maker) -> None:
    source = SandboxId(mint())
    with catalog.transaction() as tx:
        mine = snapshots.insert(tx, maker.snapshot(source_sandbox=source))
        failed = snapshots.insert(
            tx, maker.snapshot(source_sandbox=source, state=SnapshotState.FAILED)
        )
        other = snapshots.insert(tx, maker.snapshot(name="other"))

        def ids(**wanted: object) -> list[SnapshotId]:
            records, _ = snapshots.list_page(tx, snapshots.Filter(**wanted))  # type: ignore[arg-type]
            return [record.id for record in records]

        assert ids(source=source) == [failed.id, mine.id]
        assert ids(source=source, states=[SnapshotState.READY]) == [mine.id]
        assert ids(name="other") == [other.id]
        assert ids() == [other.id, failed.id, mine.id]
