"""What TLS needs, read from files: at the start, and again when somebody says so (SIGHUP).

Read whole, then checked, then taken: a pair that does not fit, or that is only half written,
changes nothing but the log.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from stratabox.storage.model.errors import InvalidArgumentError

log = logging.getLogger(__name__)

_LARGEST = 1 << 20
"""Bytes of a file of certificates."""


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """Where things lie."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Material:
    """What was read, all PEM."""

    chain: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None
    expires_at: datetime
    """Of the certificate."""


class Certificates:
    """The certificate, key and client CA in force."""

    def __init__(self, files: TlsFiles) -> None:
        """Read them.

        :raise InvalidArgumentError: INVALID_TLS, naming the file and what is wrong with it.
        """
        self.files = files
        self.current = read(files)
        """Another object after each reload that worked."""
        self.on_reload: list[Callable[[], None]] = []
        """Called after each reload that worked: for servers that hold a copy."""

    def reload(self) -> bool:
        """Read them again; new connections get the new ones, and those there are go on.

        What is wrong with them is logged, and those in force stay.
        """
        try:
            self.current = read(self.files)
        except InvalidArgumentError as error:
            log.error("the certificate in force stays: %s", error.message)
            return False
        for each in self.on_reload:
            each()
        log.info(
            "the certificate %s was read again; it is good until %s",
            self.files.certificate,
            self.current.expires_at.isoformat(timespec="seconds"),
        )
        return True

    def ssl_context(self) -> ssl.SSLContext:
        """A context for servers that take OpenSSL's; load_cert_chain again in `on_reload`.

        :raise InvalidArgumentError: INVALID_TLS, when the files have changed and do not fit.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.files.certificate, self.files.key, password="")
        except OSError as error:
            raise _invalid(self.files.certificate, str(error)) from error
        if self.current.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cadata=self.current.client_ca.decode("ascii"))
        return context


def read(files: TlsFiles) -> Material:
    """Read and check the files.

    :raise InvalidArgumentError: INVALID_TLS.
    """
    # Here: the doctor imports this, and may run where the [daemon] extra is not.
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_private_key,
    )

    chain, key = _bytes_of(files.certificate), _bytes_of(files.key)
    client_ca = None if files.client_ca is None else _bytes_of(files.client_ca)
    try:
        certificate = x509.load_pem_x509_certificates(chain)[0]
    except ValueError as error:
        raise _invalid(files.certificate, "it holds no PEM certificate") from error
    try:
        private = load_pem_private_key(key, password=None)
    except TypeError as error:
        raise _invalid(files.key, "it has a passphrase; keep it without") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        # Not the error's text: who knows what of the key is in it.
        raise _invalid(files.key, "it holds no PEM private key") from error
    mine, its = (
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for public in (private.public_key(), certificate.public_key())
    )
    if mine != its:
        raise _invalid(files.key, f"it is not the key of the certificate {files.certificate}")
    if client_ca is not None and files.client_ca is not None:
        try:
            x509.load_pem_x509_certificates(client_ca)
        except ValueError as error:
            raise _invalid(files.client_ca, "it holds no PEM certificate") from error
    expires_at = certificate.not_valid_after_utc
    if expires_at <= datetime.now(UTC):
        log.warning("the certificate %s is over since %s", files.certificate, expires_at)
    return Material(chain=chain, key=key, client_ca=client_ca, expires_at=expires_at)


def _bytes_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            found = file.read(_LARGEST + 1)
    except OSError as error:
        raise _invalid(path, f"it cannot be read: {error.strerror}") from error
    if len(found) > _LARGEST:
        raise _invalid(path, f"it has more than {_LARGEST} bytes")
    return found


def _invalid(path: Path, what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"TLS: {path}: {what}", reason="INVALID_TLS", path=path)
