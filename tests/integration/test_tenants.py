"""Workspaces: one tenant tries to see, name and use another's things, by every call there is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from stratabox.client import (
    Client,
    ForbiddenError,
    NoSpaceError,
    Quota,
    QuotaExceededError,
    Sandbox,
    SnapshotLevel,
    StrataboxError,
    UnauthenticatedError,
    Volume,
    WorkspaceNotEmptyError,
    WorkspaceNotFoundError,
)
from stratabox.client.records import EventType
from stratabox.daemon.access.roles import least_role
from stratabox.daemon.rest.app import CALLS
from stratabox.storage.model.access import Role
from stratabox.storage.model.ids import mint
from support.daemon import DaemonProcess
from support.doors import free_port, key
from support.rest import Rest, rest_daemon
from support.rig import eventually
from support.tenants import Answer, Place, ask, empty, masked, methods, places

MIB = 1 << 20


@dataclass(frozen=True)
class Tenant:
    """One workspace, a user's key of it, and what it has."""

    name: str
    key: str
    client: Client
    things: dict[str, tuple[str, str]]
    """Kind of thing → its id, and its name or ""."""


@dataclass(frozen=True)
class Two:
    """Two tenants of one daemon: `ann` attacks, `bob` has things."""

    rest: Rest
    url: str
    ann: Tenant
    bob: Tenant

    @property
    def admin(self) -> Client:
        """Whoever opens the Unix socket."""
        return self.rest.client


def tenant(rest: Rest, url: str, name: str) -> Tenant:
    rest.client.workspaces.create(name)
    made: str = key(rest.daemon, "create", "--workspace", name)["key"]
    return Tenant(name, made, Client(url, 120, api_key=made), {})


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder: Path = tmp_path_factory.mktemp("tenants")
    url = f"http://127.0.0.1:{free_port()}"
    with rest_daemon(folder, {"STRATABOX_LISTEN": url}) as rest:
        ann, bob = tenant(rest, url, "ann"), tenant(rest, url, "bob")
        box = bob.client.sandboxes.create(image="tiny", name="bobs-box")
        mine = ann.client.sandboxes.create(image="tiny", name="anns-box")
        for each, sandbox in ((ann, mine), (bob, box)):
            point = sandbox.snapshot(name=f"{each.name}s-point", level=SnapshotLevel.CRASH)
            volume = each.client.volumes.create(size_bytes=16 * MIB, name=f"{each.name}s-volume")
            still = each.client.volumes.snapshot(volume.id, name=f"{each.name}s-still")
            jobs = each.client.snapshots.compact(point.id).jobs
            each.things.update(
                sandbox=(sandbox.id, sandbox.name),
                snapshot=(point.id, point.name),
                volume=(volume.id, volume.name),
                volume_snapshot=(still.id, still.name),
                job=(jobs[0].id, ""),
                port=(sandbox.ports.add(98).id, ""),
            )
        yield Two(rest, url, ann, bob)
        for each in (ann, bob):
            for volume_ in each.client.volumes.list():
                each.client.volumes.delete(volume_.id)
            for snapshot in each.client.volumes.list_snapshots():
                each.client.volumes.delete_snapshot(snapshot.id)
            for sandbox_ in each.client.sandboxes.list(include_terminated=True):
                sandbox_.delete()
            for point_ in each.client.snapshots.list():
                each.client.snapshots.delete(point_.id)
            each.client.close()


@pytest.fixture(scope="module")
def channel(two: Two) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(two.url.removeprefix("http://")) as opened:
        yield opened


def words(two: Two, kind: str) -> list[tuple[str, str]]:
    """Each word that names a thing of bob's, and one of its form that names nothing."""
    id, name = two.bob.things[kind]
    pairs = [(id, mint())]
    if name:
        pairs.append((name, f"no-{name}"))
    if kind != "port":
        pairs.append((id[:13], mint()[:13]))
    return pairs


# -- what cannot be named -------------------------------------------------------------------------


@pytest.mark.parametrize("place", list(places()), ids=str)
def test_anothers_thing_is_answered_as_one_that_does_not_exist(
    two: Two, channel: grpc.Channel, place: Place
) -> None:
    mine = {kind: id for kind, (id, _) in two.ann.things.items()}

    def answer(word: str) -> Answer:
        found = ask(channel, two.ann.key, place.method, place.request(word, mine))
        return masked(found, word)

    for theirs, nobodys in words(two, place.kind):
        found = answer(theirs)
        assert found == answer(nobodys)
        assert found.code is grpc.StatusCode.NOT_FOUND, found
        assert found.reason.endswith("_NOT_FOUND")


def test_its_own_things_are_found_by_the_same_words(two: Two) -> None:
    """So that the test above cannot pass because nothing is ever found."""
    client, things = two.ann.client, two.ann.things
    for id, name in (things["sandbox"],):
        assert {client.sandboxes.get(word).id for word in (id, name, id[:13])} == {id}
    for id, name in (things["snapshot"],):
        assert {client.snapshots.get(word).id for word in (id, name, id[:13])} == {id}
    for id, name in (things["volume"],):
        assert {client.volumes.get(word).id for word in (id, name, id[:13])} == {id}
    for id, name in (things["volume_snapshot"],):
        assert {client.volumes.get_snapshot(word).id for word in (id, name)} == {id}
    assert client.jobs.get(things["job"][0]).id == things["job"][0]
    assert [port.id for port in client.ports.list()] == [things["port"][0]]


def test_nothing_that_a_tenant_can_call_tells_of_anothers(two: Two, channel: grpc.Channel) -> None:
    """Whatever takes no name: lists, metrics, jobs, ports; what it says is ann's alone."""
    secrets = [word.encode() for pair in two.bob.things.values() for word in pair if word]
    asked, told = 0, b""
    for method in methods():
        if least_role(f"{method.containing_service.full_name}/{method.name}") is Role.ADMIN:
            continue
        if not method.name.startswith(("List", "Get")):
            continue
        found = ask(channel, two.ann.key, method, empty(method))
        said = b"".join(found.messages) + repr(found).encode()
        assert not [word for word in secrets if word in said], method.name
        asked, told = asked + 1, told + said
    assert asked > 10
    assert two.ann.things["sandbox"][0].encode() in told


@pytest.mark.parametrize("call", [call for call in CALLS if "{" in call.path], ids=lambda c: c.name)
def test_rest_does_not_know_anothers_thing(two: Two, call: object) -> None:
    verb, path, name = call.verb, call.path, call.name  # type: ignore[attr-defined]
    kind = "sandbox" if "{sandbox_id}" in path else "snapshot"
    body = {"command": "true"} if name == "execute_command" else None

    def answer(word: str) -> tuple[int, bytes]:
        found = two.rest(
            verb, path.format(sandbox_id=word, snapshot_id=word), body, key=two.ann.key
        )
        return found.status, found.body.replace(word.encode(), b"...")

    for theirs, nobodys in words(two, kind):
        assert answer(theirs) == answer(nobodys)
        assert answer(theirs)[0] == 404


def test_rest_lists_only_its_own(two: Two) -> None:
    for path in ("/v1/sandboxes/list", "/v1/snapshots/list"):
        listed = two.rest("GET", path, key=two.ann.key).body
        assert b"anns-" in listed
        assert b"bobs-" not in listed
        assert b"bobs-" in two.rest("GET", path, key=two.bob.key).body


def test_events_are_of_its_own_alone(two: Two) -> None:
    seen: list[str] = []
    ready = threading.Event()

    def follow() -> None:
        for event in two.ann.client.sandboxes.watch():
            seen.append(event.sandbox.name)
            if event.type is EventType.PRESENT:
                ready.set()
            if event.sandbox.metadata.get("round") == "ann":
                return

    with ThreadPoolExecutor() as pool:
        following = pool.submit(follow)
        assert ready.wait(300)
        for each in (two.bob, two.ann):
            each.client.sandboxes.update(each.things["sandbox"][0], metadata={"round": each.name})
        following.result(300)
    assert set(seen) == {"anns-box"}


# -- what both may have ---------------------------------------------------------------------------


def test_names_and_idempotency_keys_are_each_tenants_own(two: Two) -> None:
    made: list[Volume] = [
        each.client.volumes.create(size_bytes=4 * MIB, name="data", idempotency_key="the same")
        for each in (two.ann, two.bob)
    ]
    assert made[0].id != made[1].id
    again = two.bob.client.volumes.create(
        size_bytes=4 * MIB, name="data", idempotency_key="the same"
    )
    assert again.id == made[1].id
    for each, volume in zip((two.ann, two.bob), made, strict=True):
        assert each.client.volumes.get("data").id == volume.id
        each.client.volumes.delete("data")


def test_images_are_everybodys_and_an_admins_to_make(two: Two) -> None:
    (image,) = two.ann.client.images.list()
    assert image.name == "tiny"
    for refused in (
        lambda: two.ann.client.images.delete("tiny"),
        lambda: two.ann.client.images.build_tiny(name="mine"),
        lambda: two.ann.client.workspaces.list(),
        lambda: two.ann.client.workspaces.create("more"),
        lambda: two.ann.client.workspaces.set_quota("ann", Quota()),
        lambda: two.ann.client.workspaces.delete("bob"),
    ):
        with pytest.raises(ForbiddenError):
            refused()


def test_only_an_admin_chooses_where_to_be(two: Two) -> None:
    with Client(two.rest.client.address, workspace="bob") as there:
        assert [box.name for box in there.sandboxes.list()] == ["bobs-box"]
    assert two.admin.sandboxes.list() == []
    with (
        Client(two.rest.client.address, workspace="nobody") as nowhere,
        pytest.raises(WorkspaceNotFoundError),
    ):
        nowhere.sandboxes.list()
    told = []
    for wanted in ("bob", "nobody"):
        with (
            Client(two.url, api_key=two.ann.key, workspace=wanted) as client,
            pytest.raises(ForbiddenError) as caught,
        ):
            client.sandboxes.list()
        told.append(str(caught.value))
        answer = two.rest(
            "GET", "/v1/sandboxes/list", key=two.ann.key, headers={"x-stratabox-workspace": wanted}
        )
        assert answer.status == 403
        with pytest.raises(WorkspaceNotFoundError):
            two.ann.client.workspaces.get(wanted)
    assert told[0] == told[1], "whether there is one is not told"
    assert two.ann.client.workspaces.get().name == "ann"


def test_copies_stay_where_they_are_made(two: Two) -> None:
    id, _ = two.bob.things["sandbox"]
    copies = two.bob.client.sandboxes.clone(id, name="copy", wait_for_ready=False)
    (copy,) = copies.sandboxes
    try:
        assert copy.name in {box.name for box in two.bob.client.sandboxes.list()}
        assert [box.name for box in two.ann.client.sandboxes.list()] == ["anns-box"]
    finally:
        copy.delete()
        two.bob.client.snapshots.delete(copies.snapshot.id)


# -- quotas ---------------------------------------------------------------------------------------


def test_a_quota_is_kept_to_also_by_many_at_once(two: Two) -> None:
    bob = two.bob.client
    used = two.admin.workspaces.get("bob").usage
    assert (used.sandboxes, used.cpus, used.memory) == (1, 1, 192)
    assert used.snapshots == 2
    assert used.disk_bytes > 1 << 30, "what a disk may grow to counts"
    assert two.admin.workspaces.get("default").usage.disk_bytes == 0, (
        "an image's layers are nobody's"
    )
    limit = used.disk_bytes + 10 * MIB
    two.admin.workspaces.set_quota("bob", Quota(sandboxes=1, disk_bytes=limit, snapshots=2))
    try:
        refused: list[StrataboxError] = []
        made: list[Volume] = []

        def try_one(number: int) -> None:
            try:
                made.append(bob.volumes.create(size_bytes=4 * MIB, name=f"many-{number}"))
            except QuotaExceededError as error:
                refused.append(error)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(try_one, range(8)))
        assert (len(made), len(refused)) == (2, 6), "two of them fit"
        figures = refused[0].metadata
        assert figures["resource"] == "disk"
        assert figures["limit"] == str(limit)
        assert int(figures["would_be"]) > limit
        with pytest.raises(QuotaExceededError):
            bob.volumes.resize(made[0].id, 8 * MIB)
        with pytest.raises(QuotaExceededError, match="may have 1 sandboxes, and would have 2"):
            bob.sandboxes.create(image="tiny")
        with pytest.raises(NoSpaceError):
            bob.snapshots.create(two.bob.things["sandbox"][0], level=SnapshotLevel.CRASH)
        with pytest.raises(QuotaExceededError):
            bob.snapshots.restore(two.bob.things["snapshot"][0])
        with pytest.raises(QuotaExceededError):
            bob.volumes.snapshot(made[0].id)
        answer = two.rest("POST", "/v1/sandboxes", {"image": "tiny"}, key=two.bob.key)
        assert (answer.status, answer.code) == (429, "QUOTA_EXCEEDED")
        for volume in made:
            bob.volumes.delete(volume.id)
        assert two.admin.workspaces.get("bob").usage == used
    finally:
        two.admin.workspaces.set_quota("bob", Quota())


# -- the end of one -------------------------------------------------------------------------------


def test_a_workspace_goes_when_it_is_empty_and_its_keys_with_it(two: Two) -> None:
    eve = tenant(two.rest, two.url, "eve")
    eve.client.volumes.create(size_bytes=4 * MIB, name="left")
    with pytest.raises(WorkspaceNotEmptyError, match="1 volumes"):
        two.admin.workspaces.delete("eve")
    eve.client.volumes.delete("left")
    gone = two.admin.workspaces.delete("eve")
    assert len(gone.revoked_keys) == 1
    with pytest.raises(UnauthenticatedError):
        eve.client.sandboxes.list()
    eve.client.close()
    assert "eve" not in {each.name for each in two.admin.workspaces.list()}
    with pytest.raises(StrataboxError) as caught:
        two.admin.workspaces.delete("default")
    assert caught.value.reason == "WORKSPACE_STAYS"


def test_all_of_it_outlives_the_daemon(two: Two) -> None:
    process: DaemonProcess = two.rest.daemon
    process.stop()
    process.start().close()
    box: Sandbox = two.bob.client.sandboxes.get("bobs-box")
    eventually(lambda: two.bob.client.sandboxes.get(box.id).ready)
    assert box.execute(["true"]).exit_code == 0
    assert [each.name for each in two.ann.client.sandboxes.list()] == ["anns-box"]
    assert {each.name for each in two.admin.workspaces.list()} == {"ann", "bob", "default"}
