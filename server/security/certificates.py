"""TLS of the gRPC ports: certificates from files, taken up again when the files change, and the names of client certificates."""

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from features.settings import SettingsError
from server.security.settings import SecuritySettings

_log = structlog.get_logger(__name__)
_NAMES = ("x509_subject_alternative_name", "x509_common_name")


def server_credentials(settings: SecuritySettings) -> grpc.ServerCredentials | None:
    """Returns what the ports are opened with, None for plain text.

    Raises:
        SettingsError: a file is missing or malformed, or the key is not the certificate's.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    files = _Files(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    try:
        first = files.read()
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError(f"CONCORD_TLS_CERTIFICATE, CONCORD_TLS_KEY or CONCORD_TLS_CLIENT_CA: {_why(error)}") from None
    changed: Any = files.changed  # may return None for "no change", which its stub does not know
    return grpc.dynamic_ssl_server_credentials(first, changed, require_client_authentication=settings.tls_client_ca is not None)


def client_names(auth_context: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    """Returns the alternative names and the common name of the client's certificate; none without one."""
    return tuple(name.decode("utf-8", "replace") for kind in _NAMES for name in auth_context.get(kind, ()))


class _Files:
    """The files and when they last changed; gRPC asks at every handshake, in a thread of its own."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._seen: tuple[int, ...] = ()
        self._lock = threading.Lock()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Reads the files; ValueError when they do not fit together, and they are not read again until they change."""
        self._seen = self._times()
        certificate, key = self._certificate.read_bytes(), self._key.read_bytes()
        public = load_pem_private_key(key, None).public_key()
        form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if x509.load_pem_x509_certificate(certificate).public_key().public_bytes(*form) != public.public_bytes(*form):
            raise ValueError("the key is not the certificate's")
        authorities = self._client_ca.read_bytes() if self._client_ca else None
        if authorities is not None:
            x509.load_pem_x509_certificates(authorities)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns the files' new content; None where nothing changed or what is there now is not whole (rotation is under way)."""
        with self._lock:
            try:
                if self._times() == self._seen:
                    return None
                configuration = self.read()
            except (OSError, ValueError, TypeError) as error:
                _log.warning("new certificates cannot be used; the old ones go on", error=_why(error))
                return None
            _log.info("new certificates taken up")
            return configuration

    def _times(self) -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns for path in (self._certificate, self._key, self._client_ca) if path is not None)


def _why(error: Exception) -> str:
    """Says what is wrong without quoting a file's content."""
    return (
        str(error) if isinstance(error, OSError) or str(error).startswith("the key is not") else f"not valid PEM ({type(error).__name__})"
    )
