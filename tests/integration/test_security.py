"""Keys, certificates and the audit log on real servers: PostgreSQL, TLS handshakes, the command line, and secrets kept out of sight."""

import asyncio
import contextlib
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from structlog.testing import capture_logs

from concord import Concord, error_details, tls
from concord.v1 import models_pb2, models_pb2_grpc
from server.database import postgres_breaker, postgres_pool
from server.errors import UnauthenticatedError, UnavailableError
from server.security import key_store
from server.security.audit import REQUESTED, AdminAudit, AuditEntry
from server.security.keys import ApiKeys
from server.security.scopes import CHANNEL_SCOPES
from server.settings import ServerSettings
from tests.certificates import Authority
from tests.edge import serving
from tests.fakes import Fakes
from tests.integration.test_processes import environment, process_and_ports, run

Code = grpc.StatusCode
OURS, THEIRS = Authority(), Authority()


def make_key(settings: ServerSettings, holder: str, *channels: str, days: float | None = None, scopes: Any = CHANNEL_SCOPES) -> str:
    with psycopg.connect(settings.postgres_dsn) as connection:
        return key_store.create(connection, holder, channels=channels or (holder,), scopes=sorted(scopes), lifetime_days=days)[1]


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error_details(error).reason
    return Code.OK, ""


def audit(settings: ServerSettings) -> list[tuple[str, ...]]:
    with psycopg.connect(settings.postgres_dsn) as connection:
        return connection.execute("SELECT principal, method, target, outcome FROM admin_audit ORDER BY audit_id").fetchall()


# Keys ---------------------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


@contextlib.asynccontextmanager
async def keyring(settings: ServerSettings, clock: Clock, **more: float) -> AsyncIterator[ApiKeys]:
    async with postgres_pool(settings, postgres_breaker(settings, lambda _: None)) as pool:
        yield ApiKeys(pool, now=clock, **{"refresh_seconds": 5.0, "stale_seconds": 60.0} | more)


async def refusal_of(keys: ApiKeys, bearer: str) -> str:
    with pytest.raises(UnauthenticatedError) as refused:
        await keys.authenticate(bearer)
    return refused.value.reason


async def test_a_key_is_accepted_at_once_and_wrong_ones_are_not(shop: ServerSettings) -> None:
    clock = Clock()
    async with keyring(shop, clock) as keys:
        assert await refusal_of(keys, "concord_0123_x") == "CREDENTIALS_INVALID"
        bearer = make_key(shop, "web")
        clock.now += key_store_pause()
        caller = await keys.authenticate(bearer)
        assert (caller.channels, caller.scopes) == ({"web"}, CHANNEL_SCOPES)
        for wrong in (
            bearer[:-1],
            bearer + "x",
            bearer.replace("concord_", ""),
            "concord__",
            "concord_",
            "",
            "x" * 9000,
            bearer.swapcase(),
        ):
            assert await refusal_of(keys, wrong) == "CREDENTIALS_INVALID"


def key_store_pause() -> Any:
    from server.security.keys import _MISS_PAUSE

    return _MISS_PAUSE * 2


async def test_only_a_digest_is_stored(shop: ServerSettings) -> None:
    bearer = make_key(shop, "app")
    key_id, secret = key_store.parts_of(bearer)
    with psycopg.connect(shop.postgres_dsn) as connection:
        row = connection.execute("SELECT api_keys::text, digest FROM api_keys WHERE key_id = %s", [key_id]).fetchone()
    assert row is not None
    assert secret not in row[0]
    assert row[1] == key_store.digest_of(secret)
    assert len(secret) >= 43  # 256 bits


async def test_two_keys_are_valid_while_rotating_and_never_three(new_shop: Any) -> None:
    shop, clock = new_shop(), Clock()
    first = make_key(shop, "store", days=30)
    with psycopg.connect(shop.postgres_dsn) as connection:
        second = key_store.rotate(connection, "store", overlap_hours=1)[1]
        with pytest.raises(key_store.KeyRefusedError, match="2 valid"):
            key_store.create(connection, "store", channels=["store"], scopes=[], lifetime_days=None)
        connection.commit()
        async with keyring(shop, clock) as keys:
            for bearer in (first, second):
                await keys.authenticate(bearer)
            third = key_store.rotate(connection, "store", overlap_hours=1)[1]
            connection.commit()
            clock.now += key_store_pause()
            await keys.authenticate(third)
            assert await refusal_of(keys, first) == "CREDENTIALS_INVALID"
            await keys.authenticate(second)
            clock.now += 3600 * key_store_pause()
            await keys._read()
            assert await refusal_of(keys, second) == "CREDENTIALS_EXPIRED"
            caller = await keys.authenticate(third)
        assert (caller.channels, caller.scopes) == ({"store"}, CHANNEL_SCOPES)
        key_store.revoke(connection, key_store.parts_of(third)[0])
        with pytest.raises(key_store.KeyRefusedError):
            key_store.revoke(connection, "000000000000")


async def test_a_revoked_key_is_refused_after_the_next_reading(shop: ServerSettings) -> None:
    bearer = make_key(shop, "social")
    async with keyring(shop, Clock(), refresh_seconds=0.05) as keys:
        running = asyncio.create_task(keys.run())
        await keys.authenticate(bearer)
        with psycopg.connect(shop.postgres_dsn) as connection:
            key_store.revoke(connection, key_store.parts_of(bearer)[0])
        async with asyncio.timeout(5):
            while True:
                try:
                    await keys.authenticate(bearer)
                except UnauthenticatedError:
                    break
                await asyncio.sleep(0.02)
        running.cancel()


async def test_without_postgresql_known_keys_stay_good_for_a_while_only(shop: ServerSettings) -> None:
    clock, bearer = Clock(), make_key(shop, "messaging")
    async with keyring(shop, clock) as keys:
        await keys.authenticate(bearer)
        await keys._pool.close()
        await keys.authenticate(bearer)
        clock.now += key_store_pause() * 31  # 62 s
        with pytest.raises(UnavailableError):
            await keys.authenticate(bearer)


async def test_a_log_that_cannot_be_written_stops_admin_calls_and_nothing_else(shop: ServerSettings) -> None:
    entry = AuditEntry("key:operator/1", "ModelService/ActivateModel", REQUESTED, target="model:m")
    async with postgres_pool(shop, postgres_breaker(shop, lambda _: None)) as pool:
        log = AdminAudit(pool)
        await log.require(entry)
        await pool.close()
        with pytest.raises(UnavailableError) as refused, capture_logs() as lines:
            await log.require(entry)
        assert refused.value.reason == "AUDIT_UNAVAILABLE"
        with capture_logs() as lines:
            await log.note(entry)
        assert (lines[0]["event"], lines[0]["target"]) == ("audit entry not stored", "model:m")
    assert audit(shop).count(("key:operator/1", "ModelService/ActivateModel", "model:m", "REQUESTED")) == 1


async def test_refusals_noted_are_bounded(shop: ServerSettings) -> None:
    async with postgres_pool(shop, postgres_breaker(shop, lambda _: None)) as pool:
        log = AdminAudit(pool)
        for _ in range(60):
            await log.note_refusal(AuditEntry("", "EventService/RecordEvents", "UNAUTHENTICATED bounded"), at=1000.0)
    assert 0 < sum(row[3] == "UNAUTHENTICATED bounded" for row in audit(shop)) <= 40


def test_the_audit_log_is_append_only(shop: ServerSettings) -> None:
    with psycopg.connect(shop.postgres_dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO admin_audit (principal, method, target, outcome, request_id) VALUES ('p', 'm', 't', 'OK', 'r')")
        for statement in ("UPDATE admin_audit SET outcome = 'x'", "DELETE FROM admin_audit", "TRUNCATE admin_audit"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
                connection.execute(statement)
        assert connection.execute("SELECT count(*) > 0 FROM admin_audit").fetchone() == (True,)


def test_keys_are_managed_from_the_command_line(new_shop: Any) -> None:
    shop = new_shop()
    made = run(shop, "keys", "create", "web", "--days", "30")
    bearer = made.stdout.strip()
    assert (made.returncode, bearer.startswith("concord_")) == (0, True), made.stderr
    rotated = run(shop, "keys", "rotate", "web")
    assert rotated.stdout.strip() != bearer
    listed = run(shop, "keys", "list", COLUMNS="200").stdout
    key_id, secret = key_store.parts_of(bearer)
    assert (key_id in listed, secret in listed, listed.count(" valid ")) == (True, False, 2)
    third = run(shop, "keys", "create", "web")
    assert (third.returncode, "2 valid keys" in third.stderr) == (2, True)
    assert "revoked" in run(shop, "keys", "revoke", key_id).stdout
    assert run(shop, "keys", "revoke", key_id).returncode == 2
    assert run(shop, "keys", "create", "web", "--scope", "all").returncode == 2
    assert run(shop, "keys", "create", "web", "--scope", "catalog:write").returncode == 2  # an item is the whole shop's
    assert run(shop, "keys", "create", "fax").returncode == 2
    assert [(row[1], row[2].partition(":")[0]) for row in audit(shop)] == [
        ("keys create", "key"),
        ("keys rotate", "key"),
        ("keys revoke", "key"),
    ]


# Certificates -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    OURS.server().write(folder, "server")
    for name in ("channel:web", "channel:app", "operator:anna", "stranger"):
        OURS.client(name).write(folder, name.replace(":", "-"))
    THEIRS.client("channel:web").write(folder, "forged")
    (folder / "mismatched.pem").write_bytes((folder / "channel-web.pem").read_bytes())
    (folder / "mismatched.key").write_bytes((folder / "channel-app.key").read_bytes())
    (folder / "ca.pem").write_bytes(OURS.pem)
    (folder / "other-ca.pem").write_bytes(THEIRS.pem)
    return folder


def tls_settings(pki: Path, *, mutual: bool) -> dict[str, Any]:
    files = {"tls_certificate": pki / "server.pem", "tls_key": pki / "server.key"}
    return files | ({"tls_client_ca": pki / "ca.pem"} if mutual else {})


def backend(port: int, pki: Path, name: str = "", *, channel: str = "web", ca: str = "ca", **more: Any) -> Concord:
    certificate, key = (pki / f"{name}.pem", pki / f"{name}.key") if name else (None, None)
    credentials = tls(pki / f"{ca}.pem", certificate=certificate, private_key=key)
    return Concord(f"localhost:{port}", channel=channel, credentials=credentials, **more)


async def test_only_clients_with_our_certificate_reach_a_handler(pki: Path) -> None:
    from server.security.gate import Gate

    fakes = Fakes(gate=Gate(None, open_to_all=False))
    async with serving(fakes, auth="mtls", **tls_settings(pki, mutual=True)) as edge:
        port = edge.server.port
        async with Concord(f"localhost:{port}", channel="web") as plain:
            assert (await code_of(plain.recommend("anna", surface="home")))[0] is Code.UNAVAILABLE
        for name, ca in (("", "ca"), ("forged", "ca"), ("channel-web", "other-ca"), ("mismatched", "ca")):
            async with backend(port, pki, name, ca=ca) as client:
                assert (await code_of(client.recommend("anna", surface="home")))[0] is Code.UNAVAILABLE, (name, ca)
        assert fakes.recommender.calls == []
        async with backend(port, pki, "stranger") as client:
            assert await code_of(client.recommend("anna", surface="home")) == (Code.UNAUTHENTICATED, "CERTIFICATE_UNKNOWN")
        async with backend(port, pki, "channel-app") as client:
            assert await code_of(client.recommend("anna", surface="home")) == (Code.PERMISSION_DENIED, "CHANNEL_FORBIDDEN")
        assert fakes.recommender.calls == []
        async with backend(port, pki, "channel-web") as client:
            await client.recommend("anna", surface="home")
            assert (await code_of(client.resolve("anna", create=True)))[0] is Code.OK
    assert len(fakes.recommender.calls) == 1


async def test_a_rotated_certificate_is_taken_up_without_a_restart(pki: Path, tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = OURS.server().write(tmp_path, "server")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    async with serving(Fakes(), tls_certificate=certificate, tls_key=key) as edge, backend(edge.server.port, pki) as client:
        await client.recommend("anna", surface="home")
        key.write_bytes(authority.server().key)  # half a rotation: the old pair goes on
        async with backend(edge.server.port, pki) as another:
            await another.recommend("anna", surface="home")
        authority.server().write(tmp_path, "server")
        async with backend(edge.server.port, tmp_path) as fresh:
            await fresh.recommend("anna", surface="home")
        async with backend(edge.server.port, pki) as late:
            assert (await code_of(late.recommend("anna", surface="home")))[0] is Code.UNAVAILABLE
        await client.recommend("anna", surface="home")  # an open connection goes on


async def test_both_ports_have_the_certificate(pki: Path) -> None:
    async with serving(Fakes(), admin_port=0, **tls_settings(pki, mutual=False)) as edge:
        credentials = tls(pki / "ca.pem")
        for port in (edge.server.port, edge.server.admin_port):
            async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
                await models_pb2_grpc.ModelServiceStub(channel).ListModels(models_pb2.ListModelsRequest(), timeout=10)


def test_a_server_does_not_start_on_certificates_that_do_not_fit(pki: Path, tmp_path: Path) -> None:
    from features.settings import SettingsError
    from server.security.certificates import server_credentials

    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN NOTHING-----")
    for files in (
        {"tls_certificate": pki / "server.pem", "tls_key": pki / "channel-web.key"},
        {"tls_certificate": broken, "tls_key": pki / "server.key"},
        {"tls_certificate": pki / "gone.pem", "tls_key": pki / "server.key"},
        tls_settings(pki, mutual=False) | {"tls_client_ca": broken},
    ):
        with pytest.raises(SettingsError, match="CONCORD_TLS_CERTIFICATE"):
            server_credentials(ServerSettings(**files))


# A whole server ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secured(live: ServerSettings, pki: Path) -> Iterator[dict[str, Any]]:
    """``concord serve`` with mutual TLS, keys and a separate admin port, as a process; yields what the tests need."""
    keys = {
        "web": make_key(live, "web"),
        "app": make_key(live, "app"),
        "expired": make_key(live, "old", "web", days=0.0),
        "operator": make_key(live, "operator", "*", scopes=["admin", "models:read"]),
    }
    files = {f"CONCORD_{name.upper()}": str(path) for name, path in tls_settings(pki, mutual=True).items()}
    with process_and_ports(live, CONCORD_AUTH="keys", CONCORD_ADMIN_PORT="0", **files) as (_, ports):
        yield {
            "port": ports["port"],
            "admin": ports["admin_port"],
            "metrics": ports["metrics_port"],
            "keys": keys,
            "log": live.data_dir / "server.log",
        }


async def test_a_valid_certificate_with_no_or_a_wrong_or_an_expired_or_anothers_key(
    secured: dict[str, Any], pki: Path, live: ServerSettings
) -> None:
    keys = secured["keys"]
    for key, code, reason in (
        ("", Code.UNAUTHENTICATED, "CREDENTIALS_MISSING"),
        (keys["web"][:-2] + "zz", Code.UNAUTHENTICATED, "CREDENTIALS_INVALID"),
        (keys["expired"], Code.UNAUTHENTICATED, "CREDENTIALS_EXPIRED"),
        (keys["app"], Code.PERMISSION_DENIED, "CHANNEL_FORBIDDEN"),
        (keys["web"], Code.OK, ""),
    ):
        async with backend(secured["port"], pki, "channel-web", api_key=key, timeout=5.0) as client:
            assert await code_of(client.record(client.event("anna", "view", item_id="i"))) == (code, reason)
    outcomes = [row[3] for row in audit(live)]
    assert {"UNAUTHENTICATED CREDENTIALS_MISSING", "UNAUTHENTICATED CREDENTIALS_EXPIRED", "PERMISSION_DENIED CHANNEL_FORBIDDEN"} <= set(
        outcomes
    )


async def test_an_admin_call_needs_the_port_and_the_scope_and_is_noted(secured: dict[str, Any], pki: Path, live: ServerSettings) -> None:
    credentials = tls(pki / "ca.pem", certificate=pki / "operator-anna.pem", private_key=pki / "operator-anna.key")
    with psycopg.connect(live.postgres_dsn) as connection:
        row = connection.execute("SELECT model_version FROM model_versions ORDER BY published_at LIMIT 1").fetchone()
    assert row is not None
    request = models_pb2.ActivateModelRequest(model_version=row[0])

    async def activate(port: int, key: str) -> tuple[grpc.StatusCode, str]:
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            metadata = (("authorization", f"Bearer {secured['keys'][key]}"),)
            return await code_of(models_pb2_grpc.ModelServiceStub(channel).ActivateModel(request, metadata=metadata, timeout=30))

    assert await activate(secured["port"], "operator") == (Code.PERMISSION_DENIED, "WRONG_PORT")
    assert await activate(secured["admin"], "web") == (Code.PERMISSION_DENIED, "SCOPE_MISSING")
    assert (await activate(secured["admin"], "operator"))[0] is Code.OK
    noted = [row for row in audit(live) if row[1] == "ModelService/ActivateModel"]
    assert [row[3] for row in noted][-4:] == ["PERMISSION_DENIED WRONG_PORT", "PERMISSION_DENIED SCOPE_MISSING", "REQUESTED", "OK"]
    assert noted[-1][2] == f"model:{request.model_version}"


async def test_a_merge_is_noted_under_a_digest(secured: dict[str, Any], pki: Path, live: ServerSettings) -> None:
    async with backend(secured["port"], pki, "channel-web", api_key=secured["keys"]["web"], timeout=5.0) as client:
        for name in ("merge-a", "merge-b"):
            await client.record(client.event(name, "view", item_id="i"))
        merged = (await client.link("merge-a", "merge-b")).merged_user_id
    assert merged
    (noted,) = [row for row in audit(live) if row[1] == "IdentityService/LinkIdentities" and "MERGED" in row[3]]
    assert noted[2].startswith("customer:")
    with psycopg.connect(live.postgres_dsn) as connection:
        named = connection.execute("SELECT count(*) FROM admin_audit a WHERE a::text LIKE '%%' || %s || '%%'", [merged]).fetchone()
    assert named == (0,)


def test_health_is_asked_with_a_certificate(secured: dict[str, Any], pki: Path, live: ServerSettings) -> None:
    client = {
        "CONCORD_CALL_ROOT_CERTIFICATES": "ca.pem",
        "CONCORD_CALL_CERTIFICATE": "channel-web.pem",
        "CONCORD_CALL_PRIVATE_KEY": "channel-web.key",
    }
    files = {name: str(pki / file) for name, file in client.items()}
    for port in (secured["port"], secured["admin"]):
        assert "SERVING" in run(live, "health", "--server", f"localhost:{port}", **files).stdout
    assert run(live, "health", "--server", f"localhost:{secured['port']}").returncode == 1
    asked = run(
        live,
        "recommend",
        "anna",
        "--channel",
        "web",
        "--server",
        f"localhost:{secured['port']}",
        CONCORD_CALL_KEY=secured["keys"]["web"],
        **files,
    )
    assert (asked.returncode, "slate" in asked.stdout) == (0, True), asked.stderr


def test_secrets_are_seen_nowhere(secured: dict[str, Any], pki: Path, live: ServerSettings) -> None:
    """Runs last: the server's log and metrics of all that happened above, and a start with wrong settings full of canaries."""
    with urllib.request.urlopen(f"http://127.0.0.1:{secured['metrics']}/metrics", timeout=5) as answer:
        seen = answer.read().decode() + secured["log"].read_text()
    assert "concord_rpc_total" in seen
    for bearer in secured["keys"].values():
        assert key_store.parts_of(bearer)[1] not in seen
    assert (pki / "server.key").read_text().splitlines()[1] not in seen
    canary = "canary0123456789"
    secrets = {
        "CONCORD_POSTGRES_DSN": f"postgresql://u:{canary}@127.0.0.1:1/shop",
        "CONCORD_REDIS_URL": f"redis://:{canary}@127.0.0.1:1/0",
        "CONCORD_CALL_KEY": canary,
    }
    for words, more in (
        (("serve",), {}),
        (("serve",), {"CONCORD_AUTH": "jwt"}),
        (("settings",), {}),
        (("serve",), {"CONCORD_HOST": "0.0.0.0"}),
        (("recommend", "anna", "--server", "127.0.0.1:1"), {}),
        (("keys", "list"), {}),
    ):
        done = run(live, *words, **secrets, **more)
        assert canary not in done.stdout + done.stderr, words
    settings = ServerSettings(postgres_dsn=secrets["CONCORD_POSTGRES_DSN"], redis_url=secrets["CONCORD_REDIS_URL"])
    with capture_logs() as lines:
        from cli.credentials import CallSettings

        texts = [repr(settings), str(settings), repr(CallSettings(call_key=canary)), str(lines)]
    assert canary not in "".join(texts)


def test_a_public_address_needs_a_word_on_authentication(live: ServerSettings) -> None:
    done = run(live, "serve", "--ready", CONCORD_HOST="0.0.0.0")
    assert (done.returncode, "CONCORD_AUTH must be set" in done.stderr) == (2, True), done.stderr[-500:]
    started = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "serve", "--ready"],
        env=environment(live, CONCORD_HOST="0.0.0.0", CONCORD_AUTH="none"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert '"port"' in started.stdout.readline()
    started.terminate()
    assert "ANYONE WHO REACHES THIS ADDRESS" in started.communicate(timeout=30)[1]
