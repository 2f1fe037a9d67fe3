"""The result of an audit as Prometheus metrics, for the node exporter's textfile collector."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from server.audit.report import KINDS, AuditReport

_QUANTILES = {"0.5": 0.5, "0.95": 0.95, "0.99": 0.99, "1": 1.0}


def write_metrics(report: AuditReport, path: Path) -> None:
    """Writes ``concord_audit_*`` gauges to ``path``, replacing the file in one step as the collector demands."""
    registry = CollectorRegistry()
    staleness = report.staleness

    def gauge(name: str, text: str, values: Mapping[Any, float], labels: Sequence[str] = ()) -> None:
        made = Gauge(f"concord_audit_{name}", text, labels, registry=registry)
        for key, value in values.items():
            (made.labels(*key) if labels else made).set(value)

    gauge("last_run_timestamp_seconds", "When the audit ran, Unix time.", {(): report.ran_at.timestamp()})
    gauge("duration_seconds", "How long it took.", {(): report.seconds})
    # Every kind from the first run on, so that an alert on an increase sees the zero before it.
    gauge("violations", "Broken promises found, by kind.", {(kind,): float(report.kinds[kind]) for kind in KINDS}, ["kind"])
    replays = {(source, outcome): float(n) for source, counts in report.replays.items() for outcome, n in counts.items()}
    gauge("replays", "Answers replayed, by source and outcome.", replays, ["source", "outcome"])
    reasons = {(reason,): float(n) for reason, n in report.not_replayable.items()}
    gauge("not_replayable", "Answers that could not be replayed, by reason.", reasons, ["reason"])
    ratios = {(channel,): part.ratio for channel, part in report.by_channel.items()}
    gauge("agreement_ratio", "Share of live answers that agreed with the other channels and replicas.", ratios, ["channel"])
    replicas = {(replica,): part.ratio for replica, part in report.by_replica.items()}
    gauge("replica_agreement_ratio", "The same by replica.", replicas, ["replica"])
    gauge("probes", "Live answers compared.", {(): float(report.probes)})
    offers = {(result,): float(n) for result, n in report.offers.items()}
    gauge("offers", "Prices and stock flags compared with the catalogue, by result.", offers, ["result"])
    states = {(result,): float(n) for result, n in report.states.items()}
    gauge("states", "Customers whose online state was compared with PostgreSQL, by result.", states, ["result"])
    quantiles = {(label,): staleness.quantile(share) for label, share in _QUANTILES.items()}
    gauge("answer_staleness_seconds", "Age of the oldest event a logged answer lacked.", quantiles, ["quantile"])
    gauge("customers_lagging", "Customers whose online version is behind PostgreSQL.", {(): float(staleness.customers_lagging)})
    gauge("outbox_customers", "Customers waiting to be written online.", {(): float(staleness.outbox_size)})
    gauge("outbox_age_seconds", "Age of the oldest of them.", {(): staleness.outbox_seconds})
    behind = {("offers",): float(staleness.offers_behind), ("index",): float(staleness.index_behind)}
    gauge("pointer_behind", "Versions by which a pointer in Redis is behind PostgreSQL.", behind, ["pointer"])
    if staleness.visible_seconds is not None:
        text = "From a canary event in one channel until all others showed it."
        gauge("event_visible_seconds", text, {(): staleness.visible_seconds})
    write_to_textfile(str(path), registry)
