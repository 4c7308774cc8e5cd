"""One daemon for all tests of Tenki's API that do it no harm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stratabox.tenki.v1 import records_pb2
from support.tenki import Tenki, tenki_daemon


@pytest.fixture(scope="session")
def tenki(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenki]:
    with tenki_daemon(tmp_path_factory.mktemp("tenki")) as made:
        yield made


@pytest.fixture(scope="module")
def session(tenki: Tenki) -> Iterator[records_pb2.SandboxSession]:
    """A session that a module's tests share; they leave it as they found it."""
    made = tenki.create().session
    yield made
    tenki.terminate(made.id)
