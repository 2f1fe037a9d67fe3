"""Tokens (JWT) and the settings of authentication: what is accepted, what is not, and what stops a server from starting."""

import base64
import hmac
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from structlog.testing import capture_logs

from features.settings import SettingsError, load_settings
from server.errors import UnauthenticatedError
from server.security.gate import check_exposure
from server.security.scopes import Scope
from server.security.settings import SecuritySettings, is_loopback
from server.security.web_tokens import WebTokens
from server.settings import ServerSettings

KEY, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
NOW = datetime.now(UTC)
LIFE = timedelta(hours=1)  # PyJWT looks at the real clock, and a whole run of the tests takes minutes
CLAIMS = {"iss": "https://id.example", "aud": "concord", "sub": "web-backend", "channels": ["web"], "scope": "events:write admin"}


def public_pem(key: Any) -> bytes:
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


def token(key: Any = KEY, *, algorithm: str = "ES256", kid: str = "", **changed: Any) -> str:
    claims = {name: value for name, value in (CLAIMS | {"exp": NOW + LIFE} | changed).items() if value is not None}
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid} if kid else None)


def tokens(path: Path, content: bytes, *, now: datetime = NOW, **more: Any) -> WebTokens:
    path.write_bytes(content)
    settings = SecuritySettings(auth="jwt", jwt_issuer=CLAIMS["iss"], jwt_audience=CLAIMS["aud"], jwt_keys=path, **more)
    return WebTokens(settings, now=lambda: now)


async def reason(checker: WebTokens, text: str) -> str:
    with pytest.raises(UnauthenticatedError) as refused:
        await checker.authenticate(text)
    assert text[-20:] not in str(refused.value)
    return refused.value.reason


async def test_a_good_token_names_its_caller(tmp_path: Path) -> None:
    checker = tokens(tmp_path / "keys.pem", public_pem(KEY))
    for _ in range(2):  # the second time from memory
        caller = await checker.authenticate(token())
        assert (caller.name, caller.channels, caller.scopes) == ("jwt:web-backend", {"web"}, {Scope.EVENTS_WRITE, Scope.ADMIN})
    as_words = await checker.authenticate(token(channels="web app", scope=["catalog:read", 7]))
    assert (as_words.channels, as_words.scopes) == ({"web", "app"}, {Scope.CATALOG_READ})
    nothing = await checker.authenticate(token(channels=None, scope=None))
    assert (nothing.channels, nothing.scopes) == (frozenset(), frozenset())


@pytest.mark.parametrize(
    "changed",
    [{"iss": "https://evil.example"}, {"aud": "other"}, {"iss": None}, {"aud": None}, {"exp": None}, {"sub": None}, {"key": OTHER}],
    ids=str,
)
async def test_a_wrong_token_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert await reason(tokens(tmp_path / "keys.pem", public_pem(KEY)), token(**changed)) == "CREDENTIALS_INVALID"


@pytest.mark.parametrize("text", ["", "x", "a.b.c", "x" * 9000, "concord_1_2"])
async def test_what_is_no_token_is_refused(tmp_path: Path, text: str) -> None:
    checker = tokens(tmp_path / "keys.pem", public_pem(KEY))
    with pytest.raises(UnauthenticatedError):
        await checker.authenticate(text)


async def test_an_expired_token_is_refused_even_if_it_was_good(tmp_path: Path) -> None:
    checker = tokens(tmp_path / "keys.pem", public_pem(KEY))
    assert await reason(checker, token(exp=NOW - timedelta(minutes=1))) == "CREDENTIALS_EXPIRED"
    moments = [NOW]
    remembered = WebTokens(checker._settings, now=lambda: moments[0])
    short = token(exp=datetime.now(UTC) - timedelta(seconds=5))  # within the leeway
    await remembered.authenticate(short)
    assert remembered._known
    moments[0] = NOW + timedelta(minutes=10)
    good = token()
    remembered._known.clear()
    await remembered.authenticate(good)
    assert len(remembered._known) == 1


async def test_algorithms_are_pinned(tmp_path: Path) -> None:
    checker = tokens(tmp_path / "keys.pem", public_pem(KEY), jwt_algorithms=("RS256",))
    assert await reason(checker, token()) == "CREDENTIALS_INVALID"
    unsigned = jwt.encode(CLAIMS | {"exp": NOW + LIFE}, None, algorithm="none")
    assert await reason(tokens(tmp_path / "keys.pem", public_pem(KEY)), unsigned) == "CREDENTIALS_INVALID"


async def test_a_shared_secret_in_the_key_set_signs_nothing(tmp_path: Path) -> None:
    """A key set that holds a secret by mistake must not make it one that signs."""
    jwks = {"keys": [{"kty": "oct", "kid": "s", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA", "alg": "HS256"}, jwk(KEY, "a")]}
    checker = tokens(tmp_path / "keys.json", json.dumps(jwks).encode())
    secret = "secret-secret-secret-secret-secret"
    assert await reason(checker, jwt.encode(good_claims(), secret, algorithm="HS256", headers={"kid": "s"})) == "CREDENTIALS_INVALID"
    assert await reason(checker, signed_with_a_secret(secret, says="ES256", kid="s")) == "CREDENTIALS_INVALID"
    await checker.authenticate(token(kid="a"))


def good_claims() -> dict[str, Any]:
    return CLAIMS | {"exp": int((NOW + LIFE).timestamp())}


def signed_with_a_secret(secret: str, *, says: str, kid: str) -> str:
    """A token that names one algorithm and was signed by another."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": says, "kid": kid}, good_claims())]
    signature = hmac.digest(secret.encode(), b".".join(parts), "sha256")
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


def jwk(key: Any, kid: str) -> dict[str, Any]:
    return json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key())) | {"kid": kid}


async def test_keys_are_chosen_by_name_and_rotate_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    checker = tokens(path, json.dumps({"keys": [jwk(KEY, "old")]}).encode())
    old, new = token(kid="old"), token(OTHER, kid="new")
    await checker.authenticate(old)
    assert await reason(checker, new) == "CREDENTIALS_INVALID"
    path.write_text(json.dumps({"keys": [jwk(OTHER, "new")]}))
    checker.refresh()
    await checker.authenticate(new)
    assert await reason(checker, old) == "CREDENTIALS_INVALID"  # though it was remembered
    path.write_text("{ half a file")
    checker.refresh()
    await checker.authenticate(new)


async def test_rsa_keys_do_as_well(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    await tokens(tmp_path / "keys.pem", public_pem(key)).authenticate(token(key, algorithm="RS256"))


def test_a_file_without_a_key_stops_the_start(tmp_path: Path) -> None:
    for content in (b"", b"hello", b'{"keys": []}'):
        with pytest.raises(SettingsError, match="CONCORD_JWT_KEYS"):
            tokens(tmp_path / "keys", content)
    settings = SecuritySettings(auth="jwt", jwt_issuer="i", jwt_audience="a", jwt_keys=tmp_path / "missing")
    with pytest.raises(SettingsError, match=r"CONCORD_JWT_KEYS: .*missing cannot be read"):
        WebTokens(settings, now=lambda: NOW)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_authentication(host: str) -> None:
    assert is_loopback(host)
    check_exposure(SecuritySettings(), host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.1", "concord.internal", ""])
def test_an_open_server_on_a_network_is_refused_unless_it_is_meant(host: str) -> None:
    with pytest.raises(SettingsError, match="CONCORD_AUTH"):
        check_exposure(SecuritySettings(), host)
    with capture_logs() as lines:
        check_exposure(SecuritySettings(auth="none"), host)
    assert "ANYONE" in lines[0]["event"]
    assert lines[0]["log_level"] == "warning"
    with capture_logs() as lines:
        check_exposure(SecuritySettings(auth="keys"), host)
    assert "plain text" in lines[0]["event"]


def test_the_admin_port_counts_too() -> None:
    with pytest.raises(SettingsError):
        check_exposure(SecuritySettings(admin_host="0.0.0.0"), "127.0.0.1")
    check_exposure(SecuritySettings(admin_host="0.0.0.0", admin_port=-1), "127.0.0.1")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"CONCORD_AUTH": "password"}, "CONCORD_AUTH"),
        ({"CONCORD_AUTH": "jwt"}, "jwt_issuer"),
        ({"CONCORD_AUTH": "mtls"}, "tls_client_ca"),
        ({"CONCORD_TLS_CERTIFICATE": "a.pem"}, "tls_key"),
        ({"CONCORD_JWT_ALGORITHMS": "HS256"}, "CONCORD_JWT_ALGORITHMS"),
        ({"CONCORD_TLS_CLIENT_NAMES": "a=root"}, "CONCORD_TLS_CLIENT_NAMES"),
    ],
)
def test_settings_that_do_not_fit_together_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=named):
        load_settings(ServerSettings)


def test_the_admin_port_is_free_where_the_main_port_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (ServerSettings().admin_port, ServerSettings(port=0).admin_port, ServerSettings(port=0, admin_port=-1).admin_port) == (
        50052,
        0,
        -1,
    )
    monkeypatch.setenv("CONCORD_PORT", "0")
    assert load_settings(ServerSettings).admin_port == 0
    monkeypatch.setenv("CONCORD_ADMIN_PORT", "-1")
    assert load_settings(ServerSettings).admin_port == -1
