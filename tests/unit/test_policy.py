"""Bad input and impossible wishes, each with its typed error; and names made up."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.common import naming
from stratabox.daemon.lifecycle.policy import Resources
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError, StrataboxError
from stratabox.storage.model.records import GIB, Sandbox
from stratabox.storage.model.states import Level, SandboxState
from support.records import Maker

NOW = datetime(2024, 6, 1, tzinfo=UTC)


def bounded(error: StrataboxError) -> None:
    """Ten megabytes of input are not given back."""
    assert len(error.message) < 500
    assert all(len(value) < 500 for value in error.metadata.values())


# -- resources ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sound",
    [
        Resources(),
        Resources(cpus=1, memory=128, storage=1),
        Resources(cpus=32, memory=32768, storage=65536),
    ],
)
def test_sound_resources(sound: Resources) -> None:
    policy.check_resources(sound)


@pytest.mark.parametrize(
    ("field", "value", "least", "most"),
    [
        *(("cpus", value, 1, 32) for value in (0, 33, -1, 2**31)),
        *(("memory", value, 128, 32768) for value in (0, 127, 32769, -512, 2**63)),
        *(("storage", value, 1, 65536) for value in (0, -1, 65537, 2**64)),
    ],
)
def test_resources_out_of_range(field: str, value: int, least: int, most: int) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        policy.check_resources(Resources(**{field: value}))
    assert caught.value.reason == "INVALID_RESOURCES"
    assert caught.value.metadata == {
        "field": field,
        "value": str(value),
        "minimum": str(least),
        "maximum": str(most),
    }
    for part in (field, str(value), f"{least}-{most}"):
        assert part in caught.value.message


def test_data_disks() -> None:
    policy.check_data_disks([])
    policy.check_data_disks([1, 65536] * 4)
    for sizes in ([0], [1, -1], [65537], [1] * 9, [2**64]):
        with pytest.raises(InvalidArgumentError) as caught:
            policy.check_data_disks(sizes)
        assert caught.value.reason == "INVALID_RESOURCES"
        assert caught.value.metadata["field"] == "data_disks"


@pytest.mark.parametrize(
    ("storage", "minimum", "fits"),
    [(1, 0, True), (1, GIB, True), (1, GIB + 1, False), (2, GIB + 1, True), (3, 64 * GIB, False)],
)
def test_storage_is_no_smaller_than_what_it_is_to_hold(
    storage: int, minimum: int, fits: bool
) -> None:
    if fits:
        policy.check_storage_holds(storage, minimum, "image 'debian'")
        return
    with pytest.raises(InvalidArgumentError) as caught:
        policy.check_storage_holds(storage, minimum, "image 'debian'")
    assert caught.value.reason == "INVALID_RESOURCES"
    assert caught.value.metadata["minimum"] == str(policy.gib(minimum))
    assert "image 'debian'" in caught.value.message


@settings(deadline=None)
@given(size=st.integers(0, 1 << 50))
def test_gib_rounds_up(size: int) -> None:
    assert (policy.gib(size) - 1) * GIB < size <= policy.gib(size) * GIB or size == 0


def test_the_default_storage_holds_the_image(maker: Maker) -> None:
    image = maker.image(size=3 * GIB + 1)
    assert [policy.default_storage(image, configured) for configured in (0, 4, 10)] == [4, 4, 10]


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["a", "web server 1", "Überkasten", "名前", "🦀", "it's \"fine\"", "-rf", "..", "a" * 255,
     "é" * 127, "$(reboot)", "%s", "1111"],
)  # fmt: skip
def test_free_text_is_a_name(name: str) -> None:
    assert policy.check_name(name) == name


CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)]


@pytest.mark.parametrize(
    "name",
    ["", " ", "\u3000", "a/b", "../../etc/passwd", "/", "a\\b", "a" * 256, "é" * 128,
     "x" * 10_000_000, "/" * 10_000_000, "\udc80", *(f"a{control}b" for control in CONTROLS)],
    ids=lambda name: ascii(name)[:20],
)  # fmt: skip
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        policy.check_name(name, "snapshot_name")
    assert caught.value.reason == "INVALID_ARGUMENT"
    assert caught.value.metadata == {"field": "snapshot_name"}
    assert caught.value.message.startswith("snapshot_name ")
    assert caught.value.message.isprintable()
    bounded(caught.value)


@settings(deadline=None)
@given(name=st.text())
def test_every_text_is_a_name_or_refused(name: str) -> None:
    try:
        policy.check_name(name)
    except InvalidArgumentError:
        return
    assert len(name.encode()) <= 255
    assert not set(name) & {*CONTROLS, "/", "\\"}


@pytest.mark.parametrize("name", ["debian", "tiny-2", "A.b_c", "0", "a" * 128])
def test_image_names(name: str) -> None:
    assert policy.check_image_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", ".a", "_a", "a b", "a/b", "a\n", "é", "a" * 129, "x" * 10_000_000, "a\0", "\udc80"],
    ids=lambda name: ascii(name)[:20],
)
def test_what_is_no_image_name(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        policy.check_image_name(name)
    assert caught.value.metadata == {"field": "name"}
    bounded(caught.value)


def test_made_up_names_are_names_and_rarely_the_same() -> None:
    made = [naming.make_up() for _ in range(200)]
    assert len(set(made)) > 190
    for name in made:
        assert policy.check_image_name(policy.check_name(name)) == name
        assert re.fullmatch(r"[a-z]+-[a-z]+-[0-9]{5}", name)


# -- maps, tags, expiry ---------------------------------------------------------------------------


def test_sound_environments() -> None:
    policy.check_env({})
    policy.check_env({"PATH": "/bin", "_x1": "", "A": "line\nline\té"})
    policy.check_env({f"K{number}": "v" for number in range(256)})
    policy.check_env({"K": "v" * (128 * 1024 - 1)})


@pytest.mark.parametrize(
    "env",
    [
        {"": "v"}, {"1A": "v"}, {"A-B": "v"}, {"A=B": "v"}, {"É": "v"}, {"A\n": "v"}, {"A\0": "v"},
        {"A": "v\0w"}, {f"K{number}": "" for number in range(257)}, {"K": "v" * 128 * 1024},
        {"K" * 10_000_000: ""}, {"K": "é" * 64 * 1024},
    ],
    ids=lambda env: ascii(env)[:20],
)  # fmt: skip
def test_environments_that_cannot_be(env: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        policy.check_env(env)
    assert caught.value.metadata == {"field": "env"}
    bounded(caught.value)


def test_sound_metadata() -> None:
    policy.check_metadata({})
    policy.check_metadata({"any key/at all": "any\nvalue"})
    policy.check_metadata({str(number): "" for number in range(64)})
    policy.check_metadata({"k": "v" * (16 * 1024 - 1)})


@pytest.mark.parametrize(
    "metadata",
    [
        {"": "v"}, {str(number): "" for number in range(65)}, {"k": "v" * 16 * 1024},
        {"k": "x" * 10_000_000}, {"k\0": "v"}, {"k": "\0"},
    ],
    ids=lambda metadata: ascii(metadata)[:20],
)  # fmt: skip
def test_metadata_that_cannot_be(metadata: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        policy.check_metadata(metadata)
    assert caught.value.metadata == {"field": "metadata"}
    bounded(caught.value)


def test_tags_are_kept_once_in_their_order() -> None:
    assert policy.check_tags([]) == ()
    assert policy.check_tags(["b", "a", "b"]) == ("b", "a")
    assert len(policy.check_tags([str(number) for number in range(64)])) == 64


@pytest.mark.parametrize(
    "tags",
    [[""], ["a/b"], ["a\n"], ["a" * 129], ["é" * 65], [str(n) for n in range(65)], ["x" * 10**7]],
    ids=lambda tags: ascii(tags)[:20],
)
def test_tags_that_cannot_be(tags: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        policy.check_tags(tags)
    assert caught.value.metadata["field"] in ("tag", "tags")
    bounded(caught.value)


def test_an_expiry_is_in_the_future() -> None:
    policy.check_expiry(None, NOW)
    policy.check_expiry(NOW + timedelta(microseconds=1), NOW)
    for past in (NOW, NOW - timedelta(seconds=1), datetime(1970, 1, 1, tzinfo=UTC)):
        with pytest.raises(InvalidArgumentError) as caught:
            policy.check_expiry(past, NOW)
        assert caught.value.metadata == {"field": "expires_at"}
        assert past.isoformat() in caught.value.message


# -- what a state allows --------------------------------------------------------------------------


def test_an_action_takes_its_states(maker: Maker) -> None:
    for state in SandboxState:
        box = maker.sandbox(state=state, state_reason="the disk is full")
        policy.require_state(box, state, SandboxState.RUNNING, action="pause")
        with pytest.raises(DeniedError) as caught:
            policy.require_state(
                box, *(other for other in SandboxState if other is not state), action="pause"
            )
        assert caught.value.reason == "INVALID_STATE"
        assert caught.value.metadata == {"sandbox": box.id, "state": state}
        for part in ("pause", "'box'", f"it is {state}", "the disk is full"):
            assert part in caught.value.message


CRASH, APPLICATION = Level.CRASH, Level.APPLICATION

# state, clean shutdown, agent answers → the level where none is named; whether application can be
TABLE: list[tuple[str, bool, bool, Level | None, bool]] = [
    ("running", False, True, APPLICATION, True),
    ("running", False, False, CRASH, True),  # named, it is tried, and fails with the reason
    ("paused", False, True, CRASH, False),
    ("paused", False, False, CRASH, False),
    ("paused", True, True, CRASH, False),
    ("stopped", True, False, APPLICATION, True),
    ("stopped", False, False, CRASH, False),
    ("failed", False, False, CRASH, False),
    ("creating", False, False, None, False),
    ("terminating", False, False, None, False),
    ("terminating", True, False, None, False),
    ("terminated", True, False, None, False),
]


def test_the_table_has_every_state() -> None:
    assert {row[0] for row in TABLE} == set(SandboxState)


@pytest.mark.parametrize(("state", "clean", "answers", "strongest", "application"), TABLE)
def test_levels(
    maker: Maker,
    state: str,
    clean: bool,
    answers: bool,
    strongest: Level | None,
    application: bool,
) -> None:
    box = maker.sandbox(state=SandboxState(state), clean_shutdown=clean)

    refusals: list[DeniedError] = []

    def choose(wanted: Level | None, ceiling: Level = APPLICATION) -> Level | None:
        try:
            return policy.choose_level(wanted, ceiling, box, agent_answers=answers)
        except DeniedError as error:
            refusals.append(error)
            return None

    possible = None if strongest is None else CRASH
    assert choose(None) == strongest
    assert choose(None, ceiling=CRASH) == possible
    assert choose(CRASH) == choose(CRASH, ceiling=CRASH) == possible
    # A named level is never silently another one, and the configured default does not bind it.
    named = APPLICATION if application else None
    assert choose(APPLICATION) == choose(APPLICATION, ceiling=CRASH) == named
    assert (policy.why_not(CRASH, box) is None) == (possible is not None)
    assert (policy.why_not(APPLICATION, box) is None) == application
    for refusal in refusals:
        assert refusal.reason == "INVALID_STATE"
        assert refusal.metadata == {"sandbox": box.id, "state": state}


def test_memory_takes_a_guest_that_has_answered(maker: Maker) -> None:
    running = maker.sandbox(state=SandboxState.RUNNING)
    parked = maker.sandbox(state=SandboxState.PAUSED, ram_parked="ram")
    for box, fits in (
        (running, False),
        (replace(running, ready=True), True),
        (replace(running, state=SandboxState.PAUSED, ready=True), True),
        (parked, True),
    ):
        assert policy.is_past_boot(box) is fits
        if fits:
            policy.check_can_park(box)
            assert choose_memory(box) == (Level.MEMORY, Level.MEMORY)
            continue
        with pytest.raises(DeniedError) as caught:
            policy.check_can_park(box)
        assert caught.value.reason == "GUEST_BOOTING"
    for state in set(SandboxState) - {SandboxState.RUNNING, SandboxState.PAUSED}:
        with pytest.raises(DeniedError) as caught:
            policy.check_can_park(maker.sandbox(state=state, ready=True))
        assert caught.value.reason == "INVALID_STATE"
    with pytest.raises(DeniedError, match="resume it"):
        policy.require_state(parked, SandboxState.RUNNING, action="pause")


def choose_memory(box: Sandbox) -> tuple[Level, Level]:
    """What is taken where memory is named, and where nothing is."""
    named = policy.choose_level(Level.MEMORY, CRASH, box, agent_answers=True)
    return named, policy.choose_level(None, Level.MEMORY, box, agent_answers=True)


def test_limits_are_those_of_issue_2() -> None:
    assert (policy.CPUS[0], policy.CPUS[-1]) == (1, 32)
    assert (policy.MEMORY[0], policy.MEMORY[-1]) == (128, 32768)
    assert (policy.COUNT[0], policy.COUNT[-1]) == (1, 64)
