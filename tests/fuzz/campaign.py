"""One campaign against one server process: words of the shop, cases, attack, verdict."""

import importlib
import json
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import psycopg

import concord.v1
from server import tokens
from server.domain import Token
from server.settings import ServerSettings
from tests.fuzz.attack import Attack, Findings
from tests.fuzz.cases import Words, cases, methods
from tests.integration.test_processes import process

# Secrets of this shape stand in the server's environment; no error, log line or metric may repeat them.
CANARY = "CANARY-7f3a91"
# Growth of resident memory between half time and the end that still counts as flat: caches are bounded, arenas are not exact.
FLAT_MIB = 24.0


@dataclass(frozen=True)
class Verdict:
    """What a campaign found; ``log_leaks`` are lines of the server's log that hold a secret, ``bugs`` those with an error id."""

    findings: Findings
    log_leaks: int
    bugs: int

    @property
    def flat(self) -> bool:
        """Whether memory stayed flat."""
        return self.findings.growth_mib <= FLAT_MIB

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        found = self.findings
        return self.flat and not (found.internal or found.crashes or found.leaks or self.log_leaks or self.bugs)

    def line(self) -> str:
        """Returns the last line: JSON for programs."""
        found = self.findings
        figures = {
            "cases": found.cases,
            "internal": found.internal + self.bugs,
            "crashes": found.crashes,
            "leaks": found.leaks + self.log_leaks,
            "memory_growth_mib": round(found.growth_mib, 1),
            "memory_flat": self.flat,
        }
        return json.dumps(figures)


def modules() -> list[Any]:
    """Returns every generated module of the contract."""
    names = sorted(info.name for info in pkgutil.iter_modules(concord.v1.__path__) if info.name.endswith("_pb2"))
    return [importlib.import_module(f"concord.v1.{name}") for name in names]


def words(settings: ServerSettings) -> Words:
    """Returns what a backend of this very shop would send, by field name."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        users = [row[0] for row in connection.execute("SELECT user_id FROM users ORDER BY user_id LIMIT 40")]
        items = [row[0] for row in connection.execute("SELECT item_id FROM items ORDER BY item_id LIMIT 60")]
        names = [row[0] for row in connection.execute("SELECT channel_user_id FROM identities ORDER BY 1 LIMIT 40")]
        models = [row[0] for row in connection.execute("SELECT model_version FROM model_versions")]
        categories = [row[0] for row in connection.execute("SELECT DISTINCT category FROM items ORDER BY 1 LIMIT 9")]
    issued = [tokens.encode(Token(user, 1)) for user in users[:10]]
    return Words(
        {
            "user_id": [*users, "nobody"],
            "item_id": [*items, "nothing"],
            "item_ids": items,
            "context_item_ids": items,
            "exclude_item_ids": items,
            "channel_user_id": [*names, *(f"new-{k}" for k in range(50))],
            "channel": settings.channels,
            "channels": settings.channels,
            "surface": settings.surfaces,
            "category": categories,
            "categories": categories,
            "model_version": [*models, "no-such-model"],
            "consistency_token": [*[""] * 40, *issued],
            "page_token": ["", ""],
            "feature_service": ["profile_v1", "ranking_v1"],
            "feature_refs": ["user_activity:version", "user_profile:event_count", "item_profile:price"],
            "event_id": [f"00000000-0000-4000-8000-{k:012d}" for k in range(400)],
            "currency_code": ["USD", "EUR"],
            "nanos": [0, 990_000_000],
            "title": ["Enamel mug", "Linen towel"],
            "query": ["enamel mug", "linen towle", "绿茶", "🎁", "mug' OR 1=1"],
            "prefix": ["", "en", "linen t", "enmael", "绿"],
            "limit": [0, 5, 20, 100],
            "weight": [0.0, 0.5, 1.0],
            "text": ["how much is it?", "where is my order?", "what is your return policy?", "something cheaper", "退货", "hello"],
            "body": ["# Returns\n\nWithin 30 days.", "plain"],
            "url": ["https://shop.example/a", ""],
            "article_id": [f"article-{k}" for k in range(9)],
            "article_ids": [f"article-{k}" for k in range(9)],
            "related_item_id": [f"rel-{k}" for k in range(20)],
        }
    )


async def campaign(settings: ServerSettings, *, seed: int, count: int, advance: Callable[[int], None] = lambda _n: None) -> Verdict:
    """Starts a server with secrets in its settings, sends ``count`` cases, and reads its log afterwards."""
    log = settings.data_dir / "server.log"
    start = log.stat().st_size if log.exists() else 0
    with process(settings, OTEL_EXPORTER_OTLP_HEADERS=f"authorization={CANARY}") as (server, address):
        options: Sequence[tuple[str, int]] = [("grpc.max_metadata_size", 64 * 1024)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            streams = grpc.insecure_channel(address, options=options)
            attack = Attack(psutil.Process(server.pid), {"": channel}, streams, advance=advance)
            stream = cases(methods(modules()), words(settings), seed=seed, count=count)
            findings = await attack.run(stream, sample_every=max(100, count // 50))
            streams.close()
    written = _lines(log, start)
    leaks = sum(CANARY in line for line in written)
    bugs = [line for line in written if '"error_id"' in line]
    return Verdict(findings, leaks, len(bugs))


def _lines(log: Path, start: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()
