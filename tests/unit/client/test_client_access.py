"""What a client shows, to whom, and where it has that from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from stratabox.client import (
    Client,
    InvalidAddressError,
    InvalidArgumentError,
    RateLimitedError,
    UnauthenticatedError,
)
from stratabox.client._access import access

KEY = "tk_abc_def"
NEAR, FAR, SOCKET = "http://127.0.0.1:1", "https://h:1", "unix:///run/s"


def test_a_key_goes_where_it_is_safe() -> None:
    bearer = (("authorization", f"Bearer {KEY}"),)
    for address in (NEAR, FAR, "http://localhost:1", "http://[::1]:1"):
        assert access(address, KEY, environ={}).metadata == bearer
        assert access(address, environ={"STRATABOX_API_KEY": f" {KEY}\n"}).metadata == bearer
        assert access(address, environ={"STRATABOX_API_KEY": ""}).metadata == ()
    assert access(SOCKET, KEY, environ={}).metadata == ()
    assert KEY not in repr(access(FAR, KEY, environ={}))
    for address in ("http://h:1", "http://192.0.2.1:1", "http://127.0.0.1.example.org:1"):
        with pytest.raises(InvalidAddressError) as caught:
            access(address, KEY, environ={})
        assert KEY not in str(caught.value)
        access(address, environ={})  # without a key there is none to lose


@pytest.mark.parametrize("wrong", ["hunter2", "tk_é", "tk_a\nb", "Bearer tk_x"])
def test_what_is_no_key_is_not_sent(wrong: str) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        access(FAR, wrong, environ={})
    assert wrong not in str(caught.value)


def test_files_of_tls(tmp_path: Path) -> None:
    environ = {
        "STRATABOX_CA_FILE": "/ca",
        "STRATABOX_CLIENT_CERTIFICATE": "/c",
        "STRATABOX_CLIENT_KEY": "/k",
    }
    found = access(FAR, environ=environ)
    assert (found.ca_file, found.certificate) == (Path("/ca"), (Path("/c"), Path("/k")))
    given = access(FAR, None, tmp_path, ("/c2", "/k2"), environ=environ)
    assert (given.ca_file, given.certificate) == (tmp_path, (Path("/c2"), Path("/k2")))
    del environ["STRATABOX_CLIENT_KEY"]
    with pytest.raises(InvalidArgumentError, match="STRATABOX_CLIENT_KEY"):
        access(FAR, environ=environ)
    with pytest.raises(InvalidArgumentError, match="none cannot be read"):
        Client(FAR, ca_file=tmp_path / "none")


def test_an_answer_says_when_to_try_again(daemon: Any, client: Client, make: Any) -> None:
    daemon.answers["GetSandbox"] = make.refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS", metadata={}
    )
    with pytest.raises(RateLimitedError) as caught:
        client.sandboxes.get("x")
    assert caught.value.retry_after is None
