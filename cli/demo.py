"""`concord demo`: the main job end to end on the sample shop, then five channels asking for the same customer."""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psycopg
import typer
from rich.console import Console
from rich.table import Table

from cli.context import console, progress_bars
from cli.data import Part, report_table, run_import
from cli.stack import running_server, running_stack
from concord import Concord, user
from concord.v1.recommendation_pb2 import RecommendResponse
from features.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from training.config import TrainConfig

_out = Console()
CHANNELS = ("web", "app", "mini_program", "messaging", "store")
_CUSTOMERS_COMPARED = 60
_WRITES_TIMED = 60


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command(epilog="Example: concord demo --seed 7")(demo)


@dataclass(frozen=True)
class Outcome:
    """The demo's last line, as numbers."""

    agreement: float
    read_your_writes_ms_p99: float
    ndcg_at_10: float
    popularity_ndcg_at_10: float

    def line(self) -> str:
        """Returns the last line: JSON for programs."""
        agreed = self.agreement == 1.0 and self.ndcg_at_10 > self.popularity_ndcg_at_10
        figures = {
            "status": "ok" if agreed else "failed",
            "channels": len(CHANNELS),
            "agreement": round(self.agreement, 6),
            "read_your_writes_ms_p99": round(self.read_your_writes_ms_p99, 2),
            "ndcg_at_10": round(self.ndcg_at_10, 4),
            "popularity_ndcg_at_10": round(self.popularity_ndcg_at_10, 4),
        }
        return json.dumps(figures)


def demo(seed: Annotated[int, typer.Option(help="Seed of the sample shop.")] = 7) -> None:
    """Runs everything: sample shop, import, Feast, fine-tuning, export, activation, server, five channel backends."""
    folder = load_settings(Settings).data_dir / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    missing = {"web", "app", "mini_program", "messaging", "store"} - set(load_settings(Settings).channels)
    if missing:
        raise SettingsError(f"CONCORD_CHANNELS lacks {', '.join(sorted(missing))}, which the demo plays")
    started = time.monotonic()
    os.environ["CONCORD_DATA_DIR"] = str(folder)
    with running_stack(folder):
        settings = load_settings(Settings)
        metrics = prepare(settings, folder, seed)
        _step("serve", "starting the gRPC server")
        with running_server(folder) as ports:
            agreement, p99 = asyncio.run(_play(f"127.0.0.1:{ports['port']}", settings))
    outcome = Outcome(agreement, p99, metrics["ndcg_at_10"], metrics["popularity_ndcg_at_10"])
    console.print(f"[dim]serve this shop again: CONCORD_DATA_DIR={folder} concord serve[/dim]", highlight=False)
    console.print(f"[dim]the whole demo took {time.monotonic() - started:.0f} s[/dim]")
    print(outcome.line())  # noqa: T201 - the last line is for programs: no wrapping, no colours
    if '"status": "ok"' not in outcome.line():
        raise typer.Exit(1)


def _step(name: str, text: str) -> None:
    console.print(f"[bold cyan]{name:<12}[/bold cyan] {text}")


def prepare(settings: Settings, folder: Path, seed: int, config: "TrainConfig | None" = None) -> dict[str, float]:
    """Everything before the server, in an empty shop: schema, data, features, model; returns the model's holdout metrics."""
    from features.bundle import fetch
    from features.importers import load_mapping
    from features.materialize import materialize
    from features.models import activate, find_model, publish
    from features.sample_shop import generate, write
    from features.schema import migrate
    from features.store import apply_repository
    from training.config import TrainConfig
    from training.run import export, train

    _step("migrate", "creating the schema")
    migrate(settings.postgres_dsn)
    _step("apply", "registering entities, feature views and services with Feast")
    apply_repository(settings)
    _step("generate", f"the sample shop, seed {seed}")
    shop = generate(seed, end=datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0))
    write(shop, folder / "sample")
    _step("import", f"{len(shop.items)} items, {len(shop.events)} events")
    with progress_bars() as progress:
        reports = run_import(
            settings, folder / "sample", load_mapping("sample_shop"), part=Part.all, rejects=folder / "rejects", progress=progress
        )
    for report in reports:
        _out.print(report_table(report, "the sample shop"))
    _step("train", "fine-tuning BERT on behaviour sequences, fitting collaborative weights and the ranker, evaluating")
    result = train(settings, config or TrainConfig.demo())
    table = Table("metric on the time split", "value")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4f}")
    _out.print(table)
    _step("export", f"{result.steps} steps in {result.seconds:.0f} s; exporting ONNX with a parity check")
    manifest = export(settings, result.run_dir, folder / "bundle")
    _step("publish", f"{manifest.model_version}, and activating it")
    with psycopg.connect(settings.postgres_dsn) as connection:
        publish(connection, folder / "bundle", settings.models_base)
        fetch(find_model(connection, manifest.model_version).uri, settings.data_dir / "bundles" / manifest.model_version)
        activate(connection, manifest.model_version)
    _step("materialize", "snapshot, index epoch, online store")
    with progress_bars() as progress:
        materialize(settings, progress=progress)
    return dict(result.metrics)


async def _play(address: str, settings: Settings) -> tuple[float, float]:
    """Plays five channel backends; returns the share of agreeing customers and the 99th percentile of read-your-writes."""
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(Concord(address, channel=name, timeout=10.0)) for name in CHANNELS}
        customers = _customers(settings)
        hero = customers[0]
        known_as = await _link_everywhere(clients, settings, hero)
        _step("ask", f"customer {hero}, known as " + ", ".join(f"{known_as[name]} ({name})" for name in CHANNELS))
        before = await _everywhere(clients, known_as)
        _show("the same customer in five channels", before)
        bought = next(item for item in before["store"].items if item.in_stock)
        recorded = await clients["store"].record(
            clients["store"].event(known_as["store"], "purchase", item_id=bought.item_id, quantity=1, value=_major(bought))
        )
        token = recorded.tokens[0].consistency_token
        after = await _everywhere(clients, known_as, token=token)
        _show(f"after {bought.title!r} was bought in the store", after)
        _step("compare", f"{_CUSTOMERS_COMPARED} customers in five channels, then {_WRITES_TIMED} writes read in another channel")
        agreement = await _agreement(clients, customers[1 : _CUSTOMERS_COMPARED + 1])
        agreed = [_same(before.values()), _same(after.values()), *agreement]
        p99 = await _read_your_writes(clients, customers[1 : _WRITES_TIMED + 1], bought.item_id)
    return sum(agreed) / len(agreed), p99


def _customers(settings: Settings) -> list[str]:
    """Returns customers with a history, those with most events first."""
    query = "SELECT user_id FROM users WHERE version > 0 AND merged_into IS NULL ORDER BY version DESC, user_id LIMIT 200"
    with psycopg.connect(settings.postgres_dsn) as connection:
        return [row[0] for row in connection.execute(query)]


async def _link_everywhere(clients: dict[str, Concord], settings: Settings, customer: str) -> dict[str, str]:
    """Returns the customer's id in each channel, linking a new one where a channel does not know them yet."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        known = dict(connection.execute("SELECT channel, channel_user_id FROM identities WHERE user_id = %s", [customer]).fetchall())
    for name in CHANNELS:
        if name not in known:
            known[name] = f"{name}-{customer}"
            await clients[name].link(known[name], user(customer))
    return known


async def _everywhere(clients: dict[str, Concord], known_as: dict[str, str], *, token: str = "") -> dict[str, RecommendResponse]:
    answers = await asyncio.gather(
        *(clients[name].recommend(known_as[name], surface="home", limit=6, consistency_token=token) for name in CHANNELS)
    )
    return dict(zip(CHANNELS, answers, strict=True))


async def _agreement(clients: dict[str, Concord], customers: Sequence[str]) -> list[bool]:
    agreed = []
    for customer in customers:
        answers = await asyncio.gather(*(client.recommend(user(customer), surface="home", limit=20) for client in clients.values()))
        agreed.append(_same(answers))
    return agreed


async def _read_your_writes(clients: dict[str, Concord], customers: Sequence[str], item_id: str) -> float:
    """Records in one channel and reads in the next; returns the 99th percentile of milliseconds from acknowledgement to answer."""
    names, taken = list(clients), []
    for k, customer in enumerate(customers):
        writer, reader = clients[names[k % len(names)]], clients[names[(k + 1) % len(names)]]
        recorded = await writer.record(writer.event(user(customer), "add_to_cart", item_id=item_id, quantity=1))
        written = recorded.tokens[0]
        started = time.perf_counter()
        answer = await reader.recommend(user(customer), surface="home", consistency_token=written.consistency_token)
        taken.append((time.perf_counter() - started) * 1000)
        if answer.versions.user_version < written.user_version:
            raise RuntimeError(f"customer {customer}: an answer is older than its token")
    return sorted(taken)[min(len(taken) - 1, int(0.99 * len(taken)))]


def _same(answers: Any) -> bool:
    """True when all answers show the same items in the same order with the same scores and prices, where eligible everywhere.

    A channel may lack items it does not sell: the order of what two channels both show must be the same.
    """
    listed = [[(item.position, item.item_id, item.score, item.price.SerializeToString()) for item in answer.items] for answer in answers]
    versions = {answer.versions.SerializeToString() for answer in answers}
    reach = min(rows[-1][0] if rows else 0 for rows in listed)
    everywhere = set.intersection(*({row[1] for row in rows} for rows in listed))
    common = [[row for row in rows if row[0] <= reach and row[1] in everywhere] for rows in listed]
    return len(versions) == 1 and all(rows == common[0] for rows in common)


def _show(title: str, answers: dict[str, RecommendResponse]) -> None:
    table = Table("#", *answers, title=title)
    for place in range(max(len(answer.items) for answer in answers.values())):
        cells = [_cell(answer.items[place]) if place < len(answer.items) else "" for answer in answers.values()]
        table.add_row(str(place + 1), *cells)
    _out.print(table)


def _cell(item: Any) -> str:
    return f"{item.title}\n[dim]{_major(item):.2f} {item.price.currency_code} · {item.score:.3f}[/dim]"


def _major(item: Any) -> float:
    return float(item.price.units + item.price.nanos / 1e9)
