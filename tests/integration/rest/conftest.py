"""One daemon with a REST API, and one guest, for all of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.rest import Rest, rest_daemon


@pytest.fixture(scope="session")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    """A daemon that serves REST; at the end nothing is left of its guests."""
    with rest_daemon(tmp_path_factory.mktemp("rest")) as served:
        yield served


@pytest.fixture(scope="session")
def box(rest: Rest) -> str:
    """Id of a sandbox that tests share; they leave it as they found it, and ready."""
    made = rest("POST", "/v1/sandboxes", {"image": "tiny", "wait_for_ready": True})
    assert made.status == 201, made
    sandbox: str = made.json["id"]
    return sandbox
