"""One metrics endpoint for all workers: each one's own are asked for when Prometheus asks, and told apart by the label ``worker``.

Their counters are not added up: one that starts again begins at 0, which ``rate`` knows how to read of a series but not of a sum.
"""

import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from server.metrics import keep_values_in_memory

_TIMEOUT_SECONDS = 1.0  # a worker that does not answer by then is left out: a gap in its series, not in the others'


class WorkerMetrics(Collector):
    """Metrics of the workers and of their supervision, registered in ``registry``.

    Args:
        registry: where Prometheus reads.
        ports: returns the metrics port of each worker that runs, by its number.
    """

    def __init__(self, registry: CollectorRegistry, ports: Callable[[], Mapping[int, int]]) -> None:
        keep_values_in_memory()
        self._ports = ports
        self.ready = Gauge("concord_workers_ready", "Worker processes that answer.", registry=registry)
        self.restarts = Counter("concord_worker_restarts", "Times a worker ended and was started again.", ["worker"], registry=registry)
        registry.register(self)

    def describe(self) -> list[Metric]:
        """Names nothing ahead of time: what there is, the workers know."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields every metric once, with the samples of all workers that answer."""
        families: dict[str, Metric] = {}
        for number, port in sorted(self._ports().items()):
            for family in text_string_to_metric_families(_asked(port)):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.add_sample(sample.name, {**sample.labels, "worker": str(number)}, sample.value)
        yield from families.values()


def _asked(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_TIMEOUT_SECONDS) as answer:
            text: str = answer.read().decode()
    except (OSError, urllib.error.URLError):
        return ""
    return text
