"""Prometheus metrics of a server process: calls, stages, slates and degraded answers, ingest, journal, versions, dependencies."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from threading import Thread
from time import perf_counter
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server, values

# The nouns of the recommendation path, in order; the same ones stand in an answer's stage timings.
STAGES = (
    "identity",
    "online_read",
    "snapshot",
    "rebuild",
    "features",
    "user_vector",
    "candidates",
    "ranking",
    "policy",
    "commit",
    "offers",
    "answer",
)
_STORES = {"online": "Redis", "record": "PostgreSQL"}
INGEST_STAGES = ("queue", "commit", "online_write")
ASSISTANT_STAGES = ("conversation", "articles", "plan", "facts", "phrase", "turn")
ENCODE_STAGES = ("tokenize", "encode", "classify")

# 0.25 ms to 10 s: a slate hit takes under 1 ms, a miss some tens, and no call outlives the default deadline by much.
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_BUCKETS = (0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """All metrics of one process, registered in ``registry``; durations are in seconds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        keep_values_in_memory()
        self._child: Any = cache(_labelled)  # labels() checks and locks for 2 µs, and a call asks for eight
        self._rpc_count = Counter("concord_rpc", "Calls answered.", ["method", "code", "channel"], registry=registry)
        self._rpc_seconds = Histogram(
            "concord_rpc_seconds", "Time from request to answer.", ["method", "channel"], buckets=_BUCKETS, registry=registry
        )
        self._in_flight = Gauge("concord_rpc_in_flight", "Calls being answered now.", registry=registry)
        self._shed = Counter("concord_rpc_shed", "Calls refused unread because too many were in flight.", registry=registry)
        self._stage = Histogram(
            "concord_stage_seconds", "Time of one stage of a recommendation.", ["stage"], buckets=_BUCKETS, registry=registry
        )
        self._ingest_stage = Histogram(
            "concord_ingest_stage_seconds", "Time of one stage of recording events.", ["stage"], buckets=_BUCKETS, registry=registry
        )
        self._encode_stage = Histogram(
            "concord_encode_stage_seconds", "Time of one stage of reading a call's texts.", ["stage"], buckets=_BUCKETS, registry=registry
        )
        self._encode_batch = Histogram(
            "concord_encode_batch_texts", "Texts in one run of the encoder or of a classifier.", buckets=_BATCHES, registry=registry
        )
        for name in ENCODE_STAGES:
            self._encode_stage.labels(name)
        for name in STAGES:  # shown from the start, with zero observations
            self._stage.labels(name)
        for name in INGEST_STAGES:
            self._ingest_stage.labels(name)
        self._slates = Counter("concord_slate", "Slates asked for, by whether one stood committed.", ["result"], registry=registry)
        self._hits, self._misses = self._slates.labels("hit"), self._slates.labels("miss")
        self._searches = Counter(
            "concord_searches", "Searches answered, by why their items are what they are.", ["outcome"], registry=registry
        )
        self._degraded = Counter("concord_degraded_answers", "Answers flagged degraded, by reason.", ["reason"], registry=registry)
        self._breaker_open = {
            store: Gauge(f"concord_{store}_breaker_open", f"1 while calls to {what} are refused at once.", registry=registry)
            for store, what in _STORES.items()
        }
        self._breaker_opened = {
            store: Counter(f"concord_{store}_breaker_opened", f"Times {what} was found to be away.", registry=registry)
            for store, what in _STORES.items()
        }
        self._events = Counter("concord_ingest_events", "Events received, by what became of them.", ["status"], registry=registry)
        self._opinions = Counter("concord_opinions_judged", "Reviews and messages whose sentiment was judged.", registry=registry)
        self._journal = Counter(
            "concord_journal", "Exposures written, dropped (the queue was full), or of a forgotten customer.", ["result"], registry=registry
        )
        self._lag = Gauge(
            "concord_online_lag_seconds", "Age of the oldest customer whose online state lags, 0 when none does.", registry=registry
        )
        self._model = Gauge(
            "concord_active_model_info", "1 for the model version this process answers with.", ["version"], registry=registry
        )
        self._active = ""
        self._load_failures = Counter("concord_model_load_failures", "Models that could not be loaded here, each try.", registry=registry)
        self._assistant_answers = Counter(
            "concord_assistant_answers", "Questions answered, by kind and why a person takes over.", ["kind", "handover"], registry=registry
        )
        self._assistant_stage = Histogram(
            "concord_assistant_stage_seconds", "Time of one stage of answering a question.", ["stage"], buckets=_BUCKETS, registry=registry
        )
        self._phrasings = Counter(
            "concord_assistant_phrasings", "What became of answers handed to the generator.", ["result"], registry=registry
        )
        for name in ASSISTANT_STAGES:
            self._assistant_stage.labels(name)
        self._replicas = Gauge("concord_replicas", "Live replicas of the fleet, as this process sees it.", registry=registry)
        self._vitals = _Vitals(registry)

    def answered(self, *, degraded: bool, stale: bool) -> None:
        """Counts a recommendation: whole, degraded, or made of a stale profile."""
        self._child(self._vitals.answers, "degraded" if degraded else "stale" if stale else "whole").inc()

    def set_dependency(self, dependency: str, up: bool) -> None:
        """Says whether a dependency answers."""
        self._vitals.dependency.labels(dependency).set(up)

    def set_versions(self, place: str, numbers: Mapping[str, int]) -> None:
        """Sets versions by kind (activation, index, offer) as this ``replica`` answers with them or as the ``fleet`` has them."""
        for kind, number in numbers.items():
            self._vitals.versions.labels(kind, place).set(number)

    def set_queues(self, lengths: Mapping[str, int]) -> None:
        """Sets how much waits in each queue of this process."""
        for queue, length in lengths.items():
            self._vitals.queues.labels(queue).set(length)

    def set_outbox(self, customers: int, oldest_seconds: float) -> None:
        """Sets how many customers wait in the outbox, and for how long the first one has."""
        self._vitals.outbox.set(customers)
        self._vitals.outbox_age.set(oldest_seconds)

    def set_connections(self, store: str, numbers: Mapping[str, int]) -> None:
        """Sets the connections of a store's pool by state."""
        for state, number in numbers.items():
            self._vitals.connections.labels(store, state).set(number)

    def set_loop_delay(self, seconds: float) -> None:
        """Sets by how much the event loop was late."""
        self._vitals.loop_delay.set(seconds)

    def observe_rpc(self, method: str, code: str, *, channel: str, seconds: float) -> None:
        """Counts one answered call; ``channel`` must be a registered channel or empty, so that labels stay bounded."""
        self._child(self._rpc_count, method, code, channel).inc()
        self._child(self._rpc_seconds, method, channel).observe(seconds)

    def call_shed(self) -> None:
        """A call was refused unread because too many were in flight."""
        self._shed.inc()

    def call_started(self) -> None:
        """One more call is being answered."""
        self._in_flight.inc()

    def call_finished(self) -> None:
        """One call fewer is being answered."""
        self._in_flight.dec()

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Records the time of one stage of a recommendation: one of STAGES, or a rarer one such as a rebuild."""
        self._child(self._stage, stage).observe(seconds)

    def observe_ingest_stage(self, stage: str, seconds: float) -> None:
        """Records the time of one of INGEST_STAGES."""
        self._ingest_stage.labels(stage).observe(seconds)

    def observe_encode_stage(self, stage: str, seconds: float) -> None:
        """Records the time of one of ENCODE_STAGES for one call."""
        self._encode_stage.labels(stage).observe(seconds)

    def observe_encode_batch(self, texts: int) -> None:
        """Records how many texts ran together."""
        self._encode_batch.observe(texts)

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Times the body as one stage of a recommendation, whether it succeeds or not."""
        started = perf_counter()
        try:
            yield
        finally:
            self.observe_stage(stage, perf_counter() - started)

    def slate_hit(self) -> None:
        """A committed slate was found."""
        self._hits.inc()

    def slate_miss(self) -> None:
        """A slate had to be computed."""
        self._misses.inc()

    def searched(self, outcome: str) -> None:
        """Counts an answered search."""
        self._child(self._searches, outcome).inc()

    def degraded(self, reason: str) -> None:
        """Counts an answer flagged degraded, once for each reason."""
        self._degraded.labels(reason).inc()

    def set_breaker(self, store: str, is_open: bool) -> None:
        """Notes that the breaker of ``online`` (Redis) or ``record`` (PostgreSQL) opened or closed."""
        self._breaker_open[store].set(is_open)
        if is_open:
            self._breaker_opened[store].inc()

    def events(self, status: str, count: int = 1) -> None:
        """Counts events by status: stored, duplicate or rejected."""
        self._events.labels(status).inc(count)

    def opinions_judged(self, count: int) -> None:
        """Counts reviews and messages that were judged."""
        self._opinions.inc(count)

    def journal_written(self, count: int) -> None:
        """Counts exposures written to the journal."""
        self._journal.labels("written").inc(count)

    def journal_dropped(self, count: int = 1) -> None:
        """Counts exposures dropped because the journal's queue was full."""
        self._journal.labels("dropped").inc(count)

    def journal_forgotten(self, count: int) -> None:
        """Counts exposures not written because their customer had been forgotten."""
        self._journal.labels("forgotten").inc(count)

    def set_online_lag(self, seconds: float) -> None:
        """Sets the age of the oldest customer whose online state lags behind PostgreSQL."""
        self._lag.set(seconds)

    def set_active_model(self, version: str) -> None:
        """Names the model version this process answers with, empty when there is none; one it answered with before goes to 0."""
        if self._active:
            self._model.labels(self._active).set(0)
        if version:
            self._model.labels(version).set(1)
        self._active = version

    def assistant_answered(self, kind: str, handover: str) -> None:
        """Counts an answer by kind, and by why a person should take over, empty where nobody needs to."""
        self._assistant_answers.labels(kind, handover).inc()

    def observe_assistant_stage(self, stage: str, seconds: float) -> None:
        """Records the time of one of ASSISTANT_STAGES, or of one of a recommendation that an answer needed."""
        if stage in ASSISTANT_STAGES:
            self._assistant_stage.labels(stage).observe(seconds)
        else:
            self.observe_stage(stage, seconds)

    def phrasing(self, result: str) -> None:
        """Counts what became of an answer handed to the generator: used, strayed, slow, failed, busy or away."""
        self._phrasings.labels(result).inc()

    def model_load_failed(self) -> None:
        """Counts a model that could not be loaded; the process goes on with the one it has."""
        self._load_failures.inc()

    def set_replicas(self, count: int) -> None:
        """Sets how many replicas live."""
        self._replicas.set(count)


def _labelled(metric: Any, *values: str) -> Any:
    return metric.labels(*values)


class _Vitals:
    """What an operator looks at first; server/vitals.py and the health watch keep the gauges up to date."""

    def __init__(self, registry: CollectorRegistry) -> None:
        ProcessCollector(registry=registry)
        build = Gauge("concord_build_info", "1, with the versions of this process.", ["version", "python"], registry=registry)
        build.labels(version("concord"), platform.python_version()).set(1)
        self.answers = Counter("concord_answers", "Recommendations by what became of them.", ["result"], registry=registry)
        for result in ("whole", "degraded", "stale"):
            self.answers.labels(result)
        self.dependency = Gauge("concord_dependency_up", "1 while a dependency answers, 0 while not.", ["dependency"], registry=registry)
        self.versions = Gauge(
            "concord_version",
            "Versions by kind, as this replica answers with them and as the fleet has them.",
            ["kind", "place"],
            registry=registry,
        )
        self.queues = Gauge("concord_queue_length", "What waits in this process: events, exposures, texts.", ["queue"], registry=registry)
        self.outbox = Gauge("concord_outbox_customers", "Customers whose online state may lag.", registry=registry)
        self.outbox_age = Gauge("concord_outbox_oldest_seconds", "Age of the first customer in the outbox.", registry=registry)
        self.connections = Gauge("concord_store_connections", "Connections by store and state.", ["store", "state"], registry=registry)
        self.loop_delay = Gauge(
            "concord_event_loop_delay_seconds", "By how much the event loop was late at the last look.", registry=registry
        )


def keep_values_in_memory() -> None:
    """Undoes what importing Feast does to prometheus_client where it comes first (feast/metrics.py, 0.67), here or in a parent process.

    It puts every metric of the process into memory-mapped files keyed by name alone, so that two registries share their counts.
    """
    values.ValueClass = values.MutexValue


class MetricsEndpoint:
    """A running HTTP endpoint at ``port``; ``close`` ends it."""

    def __init__(self, server: WSGIServer, thread: Thread) -> None:
        self._server, self._thread = server, thread
        self.port = server.server_port

    def close(self) -> None:
        """Stops serving and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> MetricsEndpoint:
    """Serves ``registry`` over HTTP in a thread; port 0 picks a free one.

    Raises:
        OSError: the port is taken.
    """
    return MetricsEndpoint(*start_http_server(port, host, registry))
