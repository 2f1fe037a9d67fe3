"""Rows 29 and 30: peers without the right certificate, and callers without the right key."""

import inspect
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import psycopg

from concord.v1 import events_pb2, recommendation_pb2
from concord.v1.common_pb2 import Subject
from server.security import key_store, keys
from server.security.scopes import CHANNEL_SCOPES
from server.settings import ServerSettings
from tests.certificates import Authority, Pair
from tests.faults.caller import Caller, Reply, event
from tests.faults.rows import Checks, Seen, row
from tests.faults.world import World

_RECOMMEND = "/concord.v1.RecommendationService/Recommend"
_RECORD = "/concord.v1.EventService/RecordEvents"


class _Certificates:
    """An authority's certificates in files, as a server's settings name them, and what a client brings."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ours, self.theirs = Authority(), Authority()
        certificate, key = self.ours.server().write(folder, "server")
        authority = folder / "authority.pem"
        authority.write_bytes(self.ours.pem)
        self.settings = {
            "CONCORD_TLS_CERTIFICATE": str(certificate),
            "CONCORD_TLS_KEY": str(key),
            "CONCORD_TLS_CLIENT_CA": str(authority),
        }

    def credentials(self, pair: Pair | None) -> grpc.ChannelCredentials:
        """Returns what a client that trusts our authority connects with."""
        if pair is None:
            return grpc.ssl_channel_credentials(self.ours.pem)
        return grpc.ssl_channel_credentials(self.ours.pem, private_key=pair.key, certificate_chain=pair.certificate)


def _question(whom: str, channel: str = "web") -> bytes:
    request = recommendation_pb2.RecommendRequest(
        subject=Subject(user_id=whom), channel=channel, surface="home", skip_exposure_logging=True
    )
    return request.SerializeToString()


@row(
    29,
    "plaintext, no client certificate, another authority's, a key that does not match",
    "UNAVAILABLE (handshake); no handler call recorded",
    fast=True,
)
async def wrong_certificates(world: World) -> Seen:
    checks = Checks()
    certificates = _Certificates(world.folder / "certificates-29")
    right, other = certificates.ours.client("channel:web"), certificates.theirs.client("channel:web")
    whom = world.customer()
    peers = {
        "plaintext": None,
        "no certificate": certificates.credentials(None),
        "another authority's": certificates.credentials(other),
        "a key that does not match": certificates.credentials(Pair(right.certificate, other.key)),
    }
    async with world.serve(world.settings(), **certificates.settings, CONCORD_AUTH="mtls") as server:
        before = await server.metric("concord_rpc_total")
        replies: dict[str, Reply] = {}
        for name, credentials in peers.items():
            async with Caller(server.address, credentials=credentials, timeout=3) as caller:
                replies[name] = await caller.raw(_RECOMMEND, _question(whom))
        recorded = await server.metric("concord_rpc_total") - before
        async with Caller(server.address, credentials=certificates.credentials(right)) as caller:
            good = await caller.raw(_RECOMMEND, _question(whom))
        checks.expect(server.alive, "alive")
    for name, reply in replies.items():
        checks.expect(reply.code == "UNAVAILABLE", f"{name}: {reply.code}")
    checks.expect(recorded == 0, f"{recorded:.0f} handler calls recorded")
    checks.expect(good.ok, f"the right certificate: {good.code} {good.details}")
    checks.tell(
        f"{', '.join(f'{name} {reply.code}' for name, reply in replies.items())}; 0 handler calls; the right certificate {good.code}"
    )
    return checks.seen()


@row(
    30,
    "valid certificate with no, a wrong or an expired API key, or another channel's",
    "UNAUTHENTICATED; PERMISSION_DENIED; audit row written; constant-time compare",
    fast=True,
)
async def wrong_keys(world: World) -> Seen:
    checks = Checks()
    settings = world.copy()
    certificates = _Certificates(world.folder / "certificates-30")
    bearers = _keys(settings)
    whom = world.customer()
    async with world.serve(settings, **certificates.settings, CONCORD_AUTH="keys") as server:
        async with Caller(server.address, credentials=certificates.credentials(certificates.ours.client("channel:web"))) as caller:
            replies = {
                name: await caller.raw(_RECOMMEND, _question(whom), metadata=(("authorization", f"Bearer {bearer}"),) if bearer else ())
                for name, bearer in bearers.items()
            }
            body = events_pb2.RecordEventsRequest(events=[event(whom, item="not-mine", channel="app")]).SerializeToString()
            replies["another channel's event"] = await caller.raw(
                _RECORD, body, metadata=(("authorization", f"Bearer {bearers['right']}"),)
            )
        with psycopg.connect(settings.postgres_dsn) as connection:
            outcomes = [str(found[0]) for found in connection.execute("SELECT outcome FROM admin_audit ORDER BY audit_id").fetchall()]
            stored = connection.execute("SELECT count(*) FROM events WHERE item_id = 'not-mine'").fetchone()
    wanted = {
        "none": "UNAUTHENTICATED",
        "wrong": "UNAUTHENTICATED",
        "expired": "UNAUTHENTICATED",
        "another channel's": "PERMISSION_DENIED",
        "another channel's event": "PERMISSION_DENIED",
        "right": "OK",
    }
    for name, code in wanted.items():
        checks.expect(replies[name].code == code, f"{name}: {replies[name].code} {replies[name].reason}")
    for code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        checks.expect(any(outcome.startswith(code) for outcome in outcomes), f"audit row of {code}: {outcomes}")
    checks.expect(stored == (0,), "nothing was stored for another channel")
    checks.expect("compare_digest" in inspect.getsource(keys), "digests are compared in constant time")
    secrets = [key_store.parts_of(bearer)[1] for bearer in bearers.values() if bearer]
    log = server.log.read_text()
    checks.expect(not any(secret and secret in log for secret in secrets), "no secret in the log")
    checks.tell(f"{', '.join(f'{name}: {reply.code}' for name, reply in replies.items())}; {len(outcomes)} audit rows; compare_digest")
    return checks.seen()


def _keys(settings: ServerSettings) -> dict[str, str]:
    """Makes a right key, an expired one and another channel's, and a wrong one of none."""
    with psycopg.connect(settings.postgres_dsn) as connection:

        def make(holder: str) -> str:
            return key_store.create(connection, holder, channels=[holder], scopes=sorted(CHANNEL_SCOPES), lifetime_days=None)[1]

        right, expired, other = make("web"), make("web"), make("app")
        past = datetime.now(UTC) - timedelta(minutes=1)
        connection.execute("UPDATE api_keys SET expires_at = %s WHERE key_id = %s", [past, key_store.parts_of(expired)[0]])
    return {
        "none": "",
        "wrong": right[:-1] + ("a" if right[-1] != "a" else "b"),
        "expired": expired,
        "another channel's": other,
        "right": right,
    }
