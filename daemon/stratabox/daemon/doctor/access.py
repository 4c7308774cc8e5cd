"""The doctor's checks of the API's TCP addresses: keys for them, and what TLS needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

from stratabox.daemon.access.keyring import Keyring
from stratabox.daemon.access.opening import certificates_of
from stratabox.daemon.config import Config
from stratabox.daemon.doctor.finding import Finding, Status
from stratabox.storage.files.layout import Layout
from stratabox.storage.model.errors import StrataboxError

_SOON = timedelta(days=14)


def check_keys(config: Config) -> Iterator[Finding]:
    """Whether anybody can use the TCP addresses."""
    if not config.doors:
        return
    where = ", ".join(map(str, config.doors))
    if _has_keys(config):
        yield Finding("api-keys", Status.OK, f"there are keys for {where}")
        return
    # Where other hosts could come in, the daemon does not start without.
    far = any(not each.is_loopback for each in config.doors)
    detail = f"{where}: every call takes an API key, and there is none that is good"
    status = Status.FAIL if far else Status.WARN
    yield Finding("api-keys", status, detail, "stratabox key create")


def check_tls(config: Config) -> Iterator[Finding]:
    """The certificate of https addresses."""
    try:
        certificates = certificates_of(config)
    except StrataboxError as error:
        remedy = "set tls.certificate and tls.key to PEM files that go together"
        yield Finding("tls", Status.FAIL, error.message, remedy)
        return
    if certificates is None:
        return
    until = certificates.current.expires_at
    detail = f"{certificates.files.certificate}, good until {until:%Y-%m-%d %H:%M} UTC"
    if until > datetime.now(UTC) + _SOON:
        yield Finding("tls", Status.OK, detail)
    else:
        remedy = "renew it, then send strataboxd a SIGHUP"
        yield Finding("tls", Status.WARN, detail, remedy)


def _has_keys(config: Config) -> bool:
    catalog = Layout(config.state_dir).catalog
    if not catalog.exists():
        return False
    try:
        with closing(Keyring(catalog)) as keyring:
            return keyring.has_good()
    except StrataboxError:  # of an older schema, which has none
        return False
