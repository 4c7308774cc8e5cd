"""Makes the gate and the certificates from the configuration, and says what cannot be served."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime

from stratabox.daemon.access.audit import AuditLog
from stratabox.daemon.access.certificates import Certificates, TlsFiles
from stratabox.daemon.access.credentials import Credentials
from stratabox.daemon.access.gate import Gate
from stratabox.daemon.access.keyring import Keyring
from stratabox.daemon.access.limits import Limiter, Limits
from stratabox.daemon.config import Config
from stratabox.storage.files.layout import Layout
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError, StrataboxError

log = logging.getLogger(__name__)


def certificates_of(config: Config) -> Certificates | None:
    """The certificates that the configuration names; None: none, and no address wants one.

    :raise InvalidArgumentError: INVALID_TLS, where an address wants what is not there, or the files
        are not what they must be.
    """
    certificate, key = config.tls_certificate, config.tls_key
    if certificate is None or key is None:
        wanting = next(iter(config.tls_doors), None)
        if wanting is None and certificate is None and key is None and not config.tls_client_ca:
            return None
        missing = "tls.certificate" if certificate is None else "tls.key"
        wants = f"to listen on {wanting}" if wanting else "TLS"
        raise InvalidArgumentError(
            f"{wants} takes {missing}, a PEM file: set it in the configuration",
            reason="INVALID_TLS",
        )
    return Certificates(TlsFiles(certificate=certificate, key=key, client_ca=config.tls_client_ca))


@asynccontextmanager
async def opened(
    config: Config,
    layout: Layout,
    note_uses: Callable[[Mapping[str, datetime]], Awaitable[object]],
    credentials: Credentials,
) -> AsyncIterator[Gate]:
    """The gate, for as long as calls come in; what it has to write down is written at the end.

    :param note_uses: as of `Gate`, and so `credentials`.
    :raise DeniedError: NO_KEYS, where the API would be open to other hosts and nobody has a key.
    :raise StrataboxError: when keys cannot be read.
    """
    async with AsyncExitStack() as stack:
        keyring = Keyring(layout.catalog)
        stack.callback(keyring.close)
        require_keys(config, keyring)
        share = config.audit_size // 8
        calls = AuditLog(layout.audit / "calls.jsonl", config.audit_size - share)
        stack.callback(calls.close)
        refused = AuditLog(layout.audit / "refused.jsonl", share)
        stack.callback(refused.close)
        limits = Limits(rate=config.limits_rate, burst=config.limits_burst, open=config.limits_open)
        gate = Gate(
            keyring=keyring,
            limiter=Limiter(limits),
            calls=calls,
            refused=refused,
            note_uses=note_uses,
            credentials=credentials,
        )
        try:
            yield gate
        finally:
            try:
                await gate.write_uses()
            except StrataboxError as error:
                log.warning("when keys were last used was not written down: %s", error.message)


def require_keys(config: Config, keyring: Keyring) -> None:
    """See that somebody can use what is about to be served.

    :raise DeniedError: NO_KEYS.
    """
    if not config.doors or keyring.has_good():
        return
    other = next((each for each in config.doors if not each.is_loopback), None)
    if other is not None:
        raise DeniedError(
            f"there is no API key that is good, so nobody could use {other}: make one with"
            " stratabox key create, then start the daemon again",
            reason="NO_KEYS",
        )
    log.warning(
        "there is no API key that is good: every call on %s is refused until stratabox key create"
        " has made one",
        ", ".join(map(str, config.doors)),
    )
