"""The audit command: replays what was answered, asks every channel and replica anew, and says where they disagree."""

import asyncio
import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.context import progress_bars, shop
from server.settings import ServerSettings

if TYPE_CHECKING:
    from server.audit.online import OnlineAudit
    from server.audit.replay import Progress
    from server.audit.report import AuditReport, Violation
    from server.audit.run import Scope
    from server.audit.store import AuditStore
    from server.audit.workshop import Workshop

_out = Console()
_SHOWN = 40


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command(epilog="Example: concord audit --last 1000 --html audit.html --prometheus audit.prom")(audit)


def audit(
    last: Annotated[int, typer.Option(help="Replay at most this many logged answers, the newest of each channel in turn.")] = 1000,
    hours: Annotated[float, typer.Option(help="Only answers of the last so many hours.")] = 24.0,
    channel: Annotated[str, typer.Option(help="Only answers of this channel; default: all.")] = "",
    customers: Annotated[int, typer.Option(help="Customers to probe live and whose online state to compare, those asked about last.")] = 10,
    surface: Annotated[list[str] | None, typer.Option(help="Where to probe, repeatable; default: the first registered one.")] = None,
    server: Annotated[list[str] | None, typer.Option(help="Replica to probe, repeatable; default: all that live.")] = None,
    write_canary: Annotated[str, typer.Option(help="Record one view of this customer id and time until every channel shows it.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the whole result here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None,
    prometheus: Annotated[Path | None, typer.Option(help="Write metrics here, for the textfile collector.")] = None,
) -> None:
    """Replays logged answers, probes all channels and replicas, and compares prices, stock and online state with PostgreSQL.

    Reads only (but for --write-canary), keeps its result in audit_results, and prints a summary as the last line (JSON). The exit
    status is 1 when a promise was found broken. Run it with the servers' own settings: they are part of what a slate is made from.
    """
    from server.audit.metrics import write_metrics
    from server.audit.run import Scope

    with shop(ServerSettings) as settings, progress_bars() as progress:
        since = datetime.now(UTC) - timedelta(hours=hours)
        scope = Scope(since, last, channel, customers, tuple(surface or settings.surfaces[:1]))
        report = asyncio.run(run_audit(settings, scope, servers=server, canary=write_canary, progress=progress))
    if json_file:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    if prometheus:
        write_metrics(report, prometheus)
    if html:
        from cli.audit_page import page

        html.write_text(page(report, project=settings.project))
    _print(report)
    print(json.dumps(report.summary()))  # noqa: T201 - the last line is for programs
    if report.violations:
        raise typer.Exit(1)


async def run_audit(
    settings: ServerSettings, scope: "Scope", *, servers: Sequence[str] | None, canary: str, progress: "Progress"
) -> "AuditReport":
    """Runs one audit and keeps its report; ``servers`` None means the replicas that live."""
    from cli.audit_probes import Clients, visible_after
    from cli.credentials import call_settings
    from server.audit.offers import OfferAudit
    from server.audit.probes import Prober
    from server.audit.report import AuditReport
    from server.audit.run import Audit
    from server.recommend.compute import policy_fingerprint
    from server.recommend.rooms import policy_of

    report = AuditReport(str(uuid.uuid4()), datetime.now(UTC))
    started = time.monotonic()
    async with _rooms(settings) as (store, workshop, online), Clients(call_settings()) as clients:
        addresses = list(servers) if servers is not None else [replica.address for replica in await store.replicas()]
        if not addresses:
            report.notes.append("no replica lives, so nothing was probed")
        prober = Prober(clients.ask, replicas=addresses, channels=settings.channels) if addresses else None
        rules = policy_fingerprint(
            policy_of(settings),
            hide_out_of_stock=settings.hide_out_of_stock,
            onnx_threads=settings.onnx_threads,
            onnx_precision=settings.onnx_precision,
        )
        run = Audit(store, workshop, online, OfferAudit(store, hide_out_of_stock=settings.hide_out_of_stock), rules=rules)
        await run.run(scope, report, prober=prober, progress=progress)
        if canary and addresses:
            report.staleness.visible_seconds = await visible_after(clients, addresses, settings.channels, customer=canary)
        report.seconds = time.monotonic() - started
        await store.save(report)
    return report


@contextlib.asynccontextmanager
async def _rooms(settings: ServerSettings) -> "AsyncIterator[tuple[AuditStore, Workshop, OnlineAudit]]":
    """Opens what the checks work on: the stores, and a workshop that computes slates by the servers' own rules."""
    import psycopg
    from psycopg.rows import dict_row

    from features.activity import UserStateCodec
    from features.registry import load_registry
    from server.audit.online import OnlineAudit
    from server.audit.store import AuditStore
    from server.audit.workshop import Workshop
    from server.database import postgres_breaker, postgres_pool, redis_breaker, redis_client
    from server.models import BundleLoader
    from server.online.store import OnlineStore
    from server.recommend.rooms import policy_of
    from server.recommend.snapshot import SnapshotBuilder

    codec = UserStateCodec((await asyncio.to_thread(load_registry, settings)).layouts, settings.project)
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(postgres_pool(settings, postgres_breaker(settings, lambda _open: None)))
        connection = await psycopg.AsyncConnection.connect(settings.postgres_dsn, autocommit=True, row_factory=dict_row)
        store = AuditStore(await stack.enter_async_context(connection))
        client = redis_client(settings)
        stack.push_async_callback(client.aclose)
        loader = BundleLoader(settings, provider=settings.onnx_provider, threads=settings.onnx_threads, precision=settings.onnx_precision)
        workshop = Workshop(store, loader, SnapshotBuilder(pool, dsn=settings.postgres_dsn), policy_of(settings))
        online = OnlineStore(client, codec, redis_breaker(settings, client, lambda _open: None))
        yield store, workshop, OnlineAudit(client, codec, online, store=store, workshop=workshop)


def _print(report: "AuditReport") -> None:
    from server.audit.report import KINDS, Outcome

    stale = report.staleness
    table = Table("check", "looked at", "as promised", "result", title=f"Audit {report.run_id}")
    for source, name in (("journal", "logged answers replayed"), ("probe", "live answers replayed"), ("redis", "committed slates")):
        counts = report.replays.get(source, Counter[str]())
        equal, gone = counts[Outcome.EQUAL.value], counts[Outcome.NOT_REPLAYABLE.value]
        table.add_row(name, str(sum(counts.values())), str(equal), f"{gone} not replayable" if gone else "")
    agreed = sum(part.agreed for part in report.by_channel.values())
    moving = f"{report.probes_moving} while versions moved" if report.probes_moving else ""
    table.add_row("live answers compared", str(report.probes), str(agreed), moving)
    unknown = f"{report.offers['unknown']} older than the history" if report.offers["unknown"] else ""
    table.add_row("prices and stock", str(report.offers.total()), str(report.offers["equal"]), unknown)
    table.add_row(
        "online states", str(report.states.total()), str(sum(report.states[name] for name in ("equal", "absent", "regrouped"))), ""
    )
    _out.print(table)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(report.not_replayable.items()))
    if reasons:
        _out.print(f"not replayable: {reasons}", highlight=False)
    quantiles = ", ".join(f"p{round(100 * share)} {stale.quantile(share):.3f} s" for share in (0.5, 0.95, 0.99))
    _out.print(f"staleness of logged answers: {quantiles}, max {stale.quantile(1):.3f} s", highlight=False)
    _out.print(
        f"customers behind online: {stale.customers_lagging} of {stale.customers_checked}; outbox {stale.outbox_size}, "
        f"oldest {stale.outbox_seconds:.1f} s; pointers behind: offers {stale.offers_behind}, index {stale.index_behind}",
        highlight=False,
    )
    if stale.visible_seconds is not None:
        _out.print(f"an event of one channel showed in all others after {1000 * stale.visible_seconds:.0f} ms", highlight=False)
    for note in report.notes:
        _out.print(f"note: {note}", highlight=False)
    if report.violations:
        found = Table("kind", "what", title=f"{len(report.violations)} violations", show_lines=True)
        for violation in report.violations[:_SHOWN]:
            found.add_row(violation.kind, escape(_described(violation)))
        _out.print(found)
    for kind, count in sorted(report.kinds.items()):
        _out.print(f"{kind} ({count}): {KINDS[kind]}", highlight=False)


def _described(violation: "Violation") -> str:
    named = (("customer", violation.customer), ("item", violation.item_id), ("slate", violation.slate_id[:16]))
    whom = ", ".join(f"{name} {value}" for name, value in named if value)
    where = " ".join(filter(None, (violation.check, violation.channel, violation.replica)))
    return f"{whom or 'the fleet'} ({where})\nexpected: {violation.expected}\nseen: {violation.seen}"
