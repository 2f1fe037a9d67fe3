"""Logs that keep secrets and metrics that can be scraped."""

import io
import json
import logging
import urllib.request
from collections.abc import Iterator

import pytest
import structlog
from prometheus_client import CollectorRegistry

from concord.v1 import common_pb2
from server.logs import configure
from server.metrics import INGEST_STAGES, STAGES, Metrics, serve_metrics


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def entries(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_are_json_with_context_level_and_time() -> None:
    stream = io.StringIO()
    logger = configure(stream=stream)
    structlog.contextvars.bind_contextvars(request_id="r1")
    logger.info("hello", count=3)
    logger.debug("not written")
    logging.getLogger("library").warning("from %s", "elsewhere")
    first, second = entries(stream)
    assert (first["event"], first["count"], first["request_id"], first["level"]) == ("hello", 3, "r1", "info")
    assert first["timestamp"]
    assert (second["event"], second["level"]) == ("from elsewhere", "warning")


def test_secrets_and_messages_are_not_written() -> None:
    stream = io.StringIO()
    logger = configure(stream=stream)
    logger.info(
        "start",
        postgres_dsn="postgresql://u:hunter2@h/d",
        api_key="hunter2",
        consistency_token="hunter2",
        url="redis://:hunter2@h:6379/0",
        said="no such key: concord_0123456789ab_hunter2-hunter2_hunter2",
        nested={"password": "hunter2", "ok": ["host=h password=hunter2 user=u"]},
        request=common_pb2.Subject(user_id="hunter2"),
    )
    try:
        raise RuntimeError(
            "cannot reach postgresql://u:hunter2@h/d or password='hunter2'\nDETAIL:  Key (user_id)=(hunter2) already exists."
        )
    except RuntimeError:
        logger.exception("failed")
    assert "hunter2" not in stream.getvalue()
    started, failed = entries(stream)
    assert started["url"] == "redis://:***@h:6379/0"
    assert started["said"] == "no such key: concord_0123456789ab_***"
    assert "Subject" in str(started["request"])
    assert "RuntimeError: cannot reach" in str(failed["exception"])


@pytest.mark.parametrize("colours", [True, False])
def test_text_for_people_shows_tracebacks_without_local_values(colours: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return colours

    stream = Terminal()
    logger = configure(stream=stream, json=False)
    secret = "hunter2"
    try:
        raise RuntimeError("broken" if secret else "")
    except RuntimeError:
        logger.exception("failed")
    assert "RuntimeError: broken" in stream.getvalue()
    assert "hunter2" not in stream.getvalue().replace('secret = "hunter2"', "")


def test_metrics_are_served_and_the_port_is_freed() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.observe_stage("ranking", 0.003)
    metrics.observe_ingest_stage("commit", 0.003)
    metrics.slate_hit()
    metrics.slate_miss()
    metrics.events("stored", 3)
    metrics.journal_written(2)
    metrics.journal_dropped()
    metrics.set_online_lag(1.5)
    metrics.set_active_model("m1")
    metrics.set_active_model("m2")
    endpoint = serve_metrics(registry, "127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    endpoint.close()
    for line in (
        'concord_stage_seconds_bucket{le="0.005",stage="ranking"} 1.0',
        'concord_ingest_stage_seconds_count{stage="commit"} 1.0',
        'concord_slate_total{result="hit"} 1.0',
        'concord_slate_total{result="miss"} 1.0',
        'concord_ingest_events_total{status="stored"} 3.0',
        'concord_journal_total{result="written"} 2.0',
        'concord_journal_total{result="dropped"} 1.0',
        "concord_online_lag_seconds 1.5",
        'concord_active_model_info{version="m1"} 0.0',
        'concord_active_model_info{version="m2"} 1.0',
        *(f'concord_stage_seconds_count{{stage="{stage}"}}' for stage in STAGES),
        *(f'concord_ingest_stage_seconds_count{{stage="{stage}"}}' for stage in INGEST_STAGES),
    ):
        assert line in text
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=5)


def test_registries_do_not_share_counts() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    Metrics(first).events("stored")
    Metrics(second).events("stored")
    assert second.get_sample_value("concord_ingest_events_total", {"status": "stored"}) == 1


def test_a_stage_is_timed_even_when_it_fails() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    with pytest.raises(ValueError, match="x"), metrics.stage("policy"):
        raise ValueError("x")
    assert registry.get_sample_value("concord_stage_seconds_count", {"stage": "policy"}) == 1
