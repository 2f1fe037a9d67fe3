"""Signed tokens (JWT) of an identity provider: issuer, audience, expiry and signature checked, algorithms pinned."""

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jwt
import structlog
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from features.settings import SettingsError
from server.errors import UnauthenticatedError
from server.security.principals import Principal, principal
from server.security.settings import SecuritySettings

_log = structlog.get_logger(__name__)
_REMEMBERED = 4096
_TOKEN_CHARS = 8192


class WebTokens:
    """Checks tokens; one that was good is remembered until it expires, since verifying a signature costs as much as an answer."""

    def __init__(self, settings: SecuritySettings, *, now: Callable[[], datetime]) -> None:
        assert settings.jwt_keys is not None
        self._path = settings.jwt_keys
        self._settings = settings
        self._now = now
        self._known: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()
        self._changed_at = 0
        self._keys: dict[str, Any] = {}
        try:
            loaded = self._load()
        except OSError as error:
            raise SettingsError(f"CONCORD_JWT_KEYS: {self._path} cannot be read: {error.strerror}") from None
        if not loaded:
            raise SettingsError(f"CONCORD_JWT_KEYS: {self._path} holds no public key")

    async def authenticate(self, bearer: str) -> Principal:
        """Returns who a token names.

        Raises:
            UnauthenticatedError: it is no valid token.
        """
        digest = hashlib.sha256(bearer.encode()).digest()
        known = self._known.get(digest)
        if known is not None and self._now().timestamp() < known[0]:
            return known[1]
        claims = self._verify(bearer)
        caller = principal(
            f"jwt:{claims['sub']}",
            _words(claims.get(self._settings.jwt_channels_claim)),
            _words(claims.get(self._settings.jwt_scopes_claim)),
        )
        self._known[digest] = (float(claims["exp"]), caller)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return caller

    async def run(self) -> None:
        """Looks for changed keys again and again until cancelled."""
        while True:
            await asyncio.sleep(self._settings.key_refresh_seconds)
            self.refresh()

    def refresh(self) -> None:
        """Reads the keys again when their file has changed; tokens accepted before are checked against the new ones."""
        try:
            if self._path.stat().st_mtime_ns != self._changed_at and self._load():  # a stat, once in seconds: no thread for that
                self._known.clear()
        except OSError as error:
            _log.warning("the file of token keys cannot be read; the keys read last go on", error=type(error).__name__)

    def _verify(self, bearer: str) -> Mapping[str, Any]:
        settings = self._settings
        try:
            if len(bearer) > _TOKEN_CHARS:
                raise jwt.InvalidTokenError
            header = jwt.get_unverified_header(bearer)
            key = self._keys.get(str(header.get("kid", "")), self._keys.get(""))
            if key is None:
                raise jwt.InvalidTokenError
            claims: Mapping[str, Any] = jwt.decode(
                bearer,
                key,
                algorithms=list(settings.jwt_algorithms),
                issuer=settings.jwt_issuer,
                audience=settings.jwt_audience,
                leeway=settings.jwt_leeway_seconds,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise UnauthenticatedError("this token has expired", reason="CREDENTIALS_EXPIRED") from None
        except (jwt.InvalidTokenError, jwt.InvalidKeyError, ValueError, TypeError):
            raise UnauthenticatedError("this is no token this shop accepts", reason="CREDENTIALS_INVALID") from None
        return claims

    def _load(self) -> bool:
        """Reads the file; False, and nothing changed, where it holds no key."""
        changed_at = self._path.stat().st_mtime_ns
        content = self._path.read_bytes()
        try:
            keys: dict[str, Any]
            if content.lstrip().startswith(b"{"):
                keys = {key.key_id or "": key for key in jwt.PyJWKSet.from_dict(json.loads(content)).keys}
            else:
                keys = {"": load_pem_public_key(content)}
        except (ValueError, jwt.PyJWTError) as error:
            _log.warning("the file of token keys cannot be understood", error=type(error).__name__)
            return False
        self._keys, self._changed_at = keys, changed_at
        return bool(keys)


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return value.split()
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []
