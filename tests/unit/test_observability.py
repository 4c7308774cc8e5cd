"""Ids of requests, the log's two forms, and what Prometheus may be told where."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from stratabox.daemon.access import request_ids
from stratabox.daemon.access.keys import new_token
from stratabox.daemon.config.rest_kind import MetricsAddresses
from stratabox.daemon.logs import JsonLines, Lines
from stratabox.daemon.prometheus.serving import _is_loopback


@pytest.mark.parametrize("id", ["a", "4f-2.x_y:z/+=@", "A" * 128])
def test_a_fit_id_is_kept(id: str) -> None:
    assert request_ids.chosen(id) == id
    assert request_ids.chosen(id.encode()) == id


@pytest.mark.parametrize("id", [None, "", "two words", "line\nbreak", "A" * 129, "ä", '"', 7])
def test_an_unfit_id_is_replaced(id: object) -> None:
    made = request_ids.chosen(id)
    assert made != id
    assert request_ids.chosen(made) == made
    assert request_ids.chosen(id) != made


def record(message: str, *, failed: bool = False) -> logging.LogRecord:
    made = logging.LogRecord("stratabox.x", logging.WARNING, "x.py", 1, message, (), None)
    if failed:
        try:
            raise ValueError("why")
        except ValueError:
            made.exc_info = sys.exc_info()
    return made


def test_json_lines() -> None:
    token = new_token().text()
    entry = json.loads(JsonLines().format(record(f'said "{token}"\nand more', failed=True)))
    assert entry["level"] == "warning"
    assert entry["logger"] == "stratabox.x"
    assert token not in str(entry)
    assert entry["message"].endswith("and more")
    assert entry["at"].endswith("Z")
    assert "ValueError: why" in entry["traceback"]
    assert "request" not in entry


def test_lines_of_a_call_have_its_id() -> None:
    reset = request_ids.current.set("r-1")
    try:
        text = Lines().format(record("it went wrong", failed=True))
        assert json.loads(JsonLines().format(record("x")))["request"] == "r-1"
        assert "\n" not in JsonLines().format(record("x", failed=True))
    finally:
        request_ids.current.reset(reset)
    assert "it went wrong [request r-1]\n" in text
    assert "[request" not in Lines().format(record("x"))


def test_where_metrics_are_served() -> None:
    kind = MetricsAddresses()
    found = kind.parse("127.0.0.1:9464, unix:///run/m.sock,https://0.0.0.0:2, [::1]:5")
    assert [str(each) for each in found] == [
        "http://127.0.0.1:9464", "unix:///run/m.sock", "https://0.0.0.0:2", "http://[::1]:5",
    ]  # fmt: skip
    assert kind.parse(json.loads(kind.toml(found))) == found
    assert kind.parse("") == ()
    for wrong in (1, "0.0.0.0:80", "http://192.0.2.1:80", "127.0.0.1", ":9464", "x:1"):
        with pytest.raises(ValueError):  # noqa: PT011 - its text may be empty: `allowed` says it
            kind.parse(wrong)


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        ("127.0.0.1:9464", True), ("127.0.0.1", True), ("localhost:1", True), ("[::1]:9464", True),
        ("[::1]", True), ("LOCALHOST", True), ("evil.example:9464", False), ("", False),
        ("192.0.2.1:9464", False), ("localhost.evil.example", False), ("[::1", False),
    ],
)  # fmt: skip
def test_hosts_that_are_loopback(host: str, fine: bool) -> None:
    assert _is_loopback(host) is fine
